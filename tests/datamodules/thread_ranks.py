"""Ranks that are threads of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor


class Ranks:
    """Runs a function on several threads, each of which is a rank, with a gather among them."""

    def __init__(self, count):
        self.count = count
        self.values = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def run(self, function):
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(function, range(self.count)))
