"""An engine that samples ahead in the trainer's process, as slowly as it is told."""

from drpo_lightning.rollout import EngineError, TransformersEngine


class EngineAhead(TransformersEngine):
    """Answers a submitted request when it is waited for, or when `finished` is called and `is_quick` says so.

    What is in flight at a weight sync is drawn from the newer weights, as with a vLLM that has not begun it.

    Attributes:
        is_quick: of a request's number, whether it has finished before anybody waits for it.
        failures: what fails, as method and number of its call (from 0).
    """

    def __init__(self, is_quick=lambda number: False, failures=(), max_restarts=0):
        super().__init__()
        self.is_quick = is_quick
        self.failures = set(failures)
        self.max_restarts = max_restarts
        self.in_flight = None
        self.version = 0
        self.open, self.begun, self.events, self.counts = {}, {}, [], {}

    def _note(self, method, what=None):
        number = self.counts[method] = self.counts.get(method, -1) + 1
        self.events.append((method, what))
        if (method, number) in self.failures:
            raise EngineError(f"{method} number {number} failed")

    def sample_ahead(self, in_flight):
        self.in_flight = in_flight

    def load_weights(self, weights):
        self._note("load", self.weights_version)
        super().load_weights(weights)
        self.version = self.weights_version
        if self.in_flight == "drop":
            self.begun = dict.fromkeys(self.begun, self.version)

    def submit(self, requests):
        self._note("submit", [request.number for request in requests])
        assert not self.open.keys() & {request.number for request in requests}
        self.open |= {request.number: request for request in requests}
        self.begun |= dict.fromkeys((request.number for request in requests), self.version)

    def collect(self, numbers):
        self._note("collect", list(numbers))
        return {number: self._answer(number) for number in numbers}

    def finished(self):
        self._note("finished")
        return {number: self._answer(number) for number in list(self.open) if self.is_quick(number)}

    def _answer(self, number):
        request = self.open.pop(number)
        (group,) = super().generate(
            [request.prompt_ids],
            request.sampling,
            num_samples=request.num_samples,
            stop_token_ids=request.stop_token_ids,
            seeds=None if request.seed is None else [request.seed],
            num_topk=request.num_topk,
        )
        version = self.begun.pop(number)
        for completion in group:
            object.__setattr__(completion, "weights_version", version)
        return group

    def generate(self, prompt_ids, sampling, **settings):
        self._note("generate", len(prompt_ids))
        return super().generate(prompt_ids, sampling, **settings)

    def close(self):
        super().close()
        self.open, self.begun = {}, {}


class UnevenEngine(EngineAhead):
    """Has every third prompt's samples before anybody waits for them."""

    def __init__(self):
        super().__init__(lambda number: number % 3 == 0)
