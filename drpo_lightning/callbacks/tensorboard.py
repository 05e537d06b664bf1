"""Writing to TensorBoard what Lightning's logger interface has no method for."""

from collections.abc import Iterable, Iterator, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.writer import SummaryWriter

from drpo_lightning.metrics import Histogram


def tensorboard_writers(trainer: Trainer) -> Iterator[SummaryWriter]:
    """The writers of the trainer's TensorBoard loggers; none on ranks other than 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def write_histogram(trainer: Trainer, tag: str, histogram: Histogram) -> None:
    """Writes a histogram at the optimizer steps completed so far; nothing if it is empty."""
    count = int(histogram.counts.sum())
    if not count:
        return
    filled = histogram.counts.nonzero().flatten()
    edges = histogram.edges.tolist()
    for writer in tensorboard_writers(trainer):
        writer.add_histogram_raw(
            tag,
            min=edges[int(filled[0])],
            max=edges[int(filled[-1]) + 1],
            num=count,
            sum=histogram.total,
            sum_squares=histogram.total_squares,
            bucket_limits=edges[1:],
            bucket_counts=histogram.counts.tolist(),
            global_step=trainer.global_step,
        )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells that are not of our own making come from `markdown_cell`."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def markdown_cell(text: str, max_characters: int) -> str:
    """A text as the cell of a Markdown table: nothing in it is markup; a longer one is cut in the middle."""
    if len(text) > max_characters:
        half = max_characters // 2
        text = f"{text[:half]} […] {text[-half:]}"
    for character, entity in (
        ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;"), ("_", "&#95;"),
        ("`", "&#96;"), ("[", "&#91;"), ("]", "&#93;"), ("\\", "&#92;"), ("\r\n", "<br>"),
        ("\r", "<br>"), ("\n", "<br>"),
    ):  # fmt: skip
        text = text.replace(character, entity)
    return text or " "
