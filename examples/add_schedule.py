"""A noise schedule of one's own, as a plugin: p(t) = 1 - (1 - t)^2, which masks much already at low levels.

bd3 pretrain --plugin examples/add_schedule.py --diffusion.schedule early --preset tiny-cpu --data.path data --run run
"""

from bd3_megatron.diffusion.schedules import SCHEDULES, Schedule


class Early(Schedule):
    """Masks a fraction ``1 - (1 - t)^2``."""

    def mask_probability(self, t):
        return 1 - (1 - t) ** 2

    def loss_weight(self, t):
        """``p'(t) / p(t)``, as for every schedule: only so is the loss a bound of the likelihood."""
        return 2 * (1 - t) / self.mask_probability(t)


SCHEDULES.add("early", Early)
