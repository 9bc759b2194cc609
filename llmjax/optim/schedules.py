import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class Cosine:
    lr: float = 3e-4
    warmup: float = 100
    final: float = 0.1

    def build(self, steps):
        w = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        return optax.schedules.warmup_cosine_decay_schedule(0.0, self.lr, w, steps, self.lr * self.final)


@dataclasses.dataclass(frozen=True)
class Constant:
    lr: float = 3e-4
    warmup: float = 0

    def build(self, steps):
        return optax.schedules.constant_schedule(self.lr)
