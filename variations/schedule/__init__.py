"""Learning-rate schedules: a multiplier of the peak at every iteration."""

from variations.schedule.shapes import WSD, Constant, Cosine, Linear

SCHEDULES: dict[str, type] = {"cosine": Cosine, "wsd": WSD, "linear": Linear, "constant": Constant}
