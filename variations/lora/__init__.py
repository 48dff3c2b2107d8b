"""Adapters of linear maps: small matrices that are added to some rows of a weight."""

from variations.lora.dora import DoRA
from variations.lora.lora import LoRA, NoAdapter

LORAS: dict[str, type] = {"none": NoAdapter, "lora": LoRA, "dora": DoRA}
