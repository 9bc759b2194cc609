"""What the tests of finetuning share."""

from llmjax.models.llama import Llama

MODEL = Llama(vocab=264, layers=2, width=64, heads=4, kv_heads=4, head_dim=16, ff=128, positions=256, theta=1e4)


class StopAfter:
    """A notice that asks the run to stop after so many looks."""

    def __init__(self, looks: int):
        self.looks = looks

    @property
    def asked(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def save_first(self) -> None:
        pass
