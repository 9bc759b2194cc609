import dataclasses

import optax

from llmjax.optim.schedules import Cosine


@dataclasses.dataclass(frozen=True)
class AdamW:
    lr: object = Cosine()
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1

    def build(self, steps):
        return optax.adamw(self.lr.build(steps), self.b1, self.b2, weight_decay=self.weight_decay)
