"""The table of families of published decoders, by the `model_type` of their config.json."""

from revnet_jax.pretrained.gpt2 import GPT2
from revnet_jax.pretrained.llama import LLAMA
from revnet_jax.pretrained.qwen import QWEN2, QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3, GPT2)}
