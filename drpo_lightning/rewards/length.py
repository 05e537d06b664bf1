"""Length of a completion as a reward."""


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """The soft overlong punishment of DAPO.

    With L = `num_tokens`, L_max = `max_tokens` and L_cache = `buffer_tokens`:

        0                               for L <= L_max - L_cache
        (L_max - L_cache - L) / L_cache for L_max - L_cache < L <= L_max
        -1                              for L > L_max

    It is continuous, and -1 is reached at L = L_max.

    Args:
        num_tokens: tokens of the completion.
        max_tokens: length from which on the penalty is whole.
        buffer_tokens: tokens before that over which it grows.

    Source: Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476, equation 13.
    """
    return min(max((max_tokens - buffer_tokens - num_tokens) / buffer_tokens, -1.0), 0.0)
