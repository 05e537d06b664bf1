import random
class ArithmeticPrompts:
    def __init__(self, split="train", max_operand=99, num_validation=500, seed=0):
        self.split, self.max_operand, self.num_validation, self.seed = split, max_operand, num_validation, seed
    def load(self):
        pairs = [(a, b) for a in range(self.max_operand + 1) for b in range(self.max_operand + 1)]
        random.Random(self.seed).shuffle(pairs)
        cut = self.num_validation
        chosen = pairs[:cut] if self.split == "validation" else pairs[cut:]
        return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in chosen]
