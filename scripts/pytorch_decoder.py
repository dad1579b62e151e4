"""Times a decoder's irreversible twin in PyTorch, as its users would train it; prints JSON lines.

    python scripts/pytorch_decoder.py --config=configs/lm_124m.py --batch=16,64

Compare it with `scripts/benchmark.py --suite=gpu --models=lm_124m`, which has the same sizes, tied
embedding, loss and clipping. The PyTorch step uses torch.compile, flash attention, mixed precision
(autocast to bfloat16, float32 parameters) and fused AdamW. Needs PyTorch, which this package does
not install.
"""

import importlib
import json
import re
import sys
import time
from typing import Any

from absl import flags

from revnet_jax.config import ConfigError, cli, flatten, language_model
from revnet_jax.errors import UserError

# Settings for which the twin in PyTorch has one value, the default. Those that it neither reads nor
# has here belong to data, to reversible models, or to how a step is split to save memory.
MUST_BE_USUAL = (
    *("model.family", "microbatches", "ema_decay", "deterministic"),
    *("optimizer.name", "optimizer.state_dtype", "optimizer.lockstep", "optimizer.clip"),
    *("optimizer.trainable", "model.param_dtype", "model.integrator", "model.lora_rank"),
    *("model.experts", "model.dropout", "model.window", "model.separate_documents"),
    *("model.head_size", "model.norm", "model.norm_eps", "model.qk_norm", "model.bias"),
    *("model.activation", "model.learned_positions", "model.rotary_scaling"),
)

CONFIG = cli.define_config_flag()
BATCH = flags.DEFINE_list("batch", ["16"], "Sequences of a step; a row for each.")
STEPS = flags.DEFINE_integer(
    "steps", 15, "Steps that are timed, after four that are not.", lower_bound=1
)


def main(argv):
    del argv
    check_settings(flatten(CONFIG.value))
    if not all(re.fullmatch("[0-9]{1,9}", text) and int(text) for text in BATCH.value):
        raise UserError(f"got --batch={','.join(BATCH.value)}, expected numbers from 1")
    try:
        # By name, so that types are checked alike with and without it.
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"{error}: install PyTorch to compare with it") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # TensorFloat-32 for float32 products, as JAX computes them on GPUs by default.
    torch.set_float32_matmul_precision("high")
    for batch in map(int, BATCH.value):
        torch.manual_seed(0)
        # Forget compiled code: for a second batch size it would compile for dynamic shapes.
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
            # The peak is then of this batch size alone.
            torch.cuda.reset_peak_memory_stats()
        row = measure(torch, CONFIG.value, batch, device)
        row["command"] = " ".join(["scripts/pytorch_decoder.py", *sys.argv[1:]])
        print(json.dumps(row), flush=True)


def check_settings(config):
    """Raises ConfigError for settings by which the two would be different models, or steps.

    Args:
      config: settings by dotted key.
    """
    usual = flatten(language_model())
    expected = {name: usual[name] for name in MUST_BE_USUAL}
    expected |= {"model.tied": True, "model.compute_dtype": "bfloat16"}
    # The family first: others do not have all of these settings.
    if config["model.family"] == usual["model.family"]:
        expected["model.kv_heads"] = config["model.heads"]
    for name, value in expected.items():
        if config[name] != value:
            raise ConfigError(
                f"config.{name}: got {config[name]!r}, expected {value!r}: the twin in PyTorch has "
                "no other"
            )


def measure(torch, config, batch, device):
    """A row of results: milliseconds per step, tokens/s, and peak bytes of the device."""
    twin = decoder(torch, config).to(device)
    optimizer = torch.optim.AdamW(
        twin.parameters(),
        lr=config.schedule.learning_rate,
        betas=(config.optimizer.b1, config.optimizer.b2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    compiled = torch.compile(twin)
    context, vocab_size = config.data.context, config.data.vocab_size
    token = torch.randint(0, vocab_size, (batch, context), device=device)
    # Each token's target is the next; the last one's is the first, which costs the same.
    target = token.roll(-1, 1)

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(token, target)
        loss.backward()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    on_gpu = device == "cuda"
    # Kernels run asynchronously: without waiting, only their launches would be timed.
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    # These compile, and are not timed.
    for _ in range(4):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(STEPS.value):
        loss = step()
    wait()
    seconds = (time.perf_counter() - started) / STEPS.value
    return {
        "model": "PyTorch",
        "parameters": sum(p.numel() for p in twin.parameters()),
        "batch": batch,
        "step_ms": 1e3 * seconds,
        "examples_per_second": batch * context / seconds,
        "unit": "tokens",
        "device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "loss": float(loss.detach()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def decoder(torch, config):
    """Our decoder: RMSNorm, causal attention with rotary positions, SwiGLU feed-forward."""
    nn, functional = torch.nn, torch.nn.functional
    width, heads, hidden = config.model.width, config.model.heads, config.model.hidden
    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)  # [B, heads, T, head size / 2] each
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
            self.qkv, self.out = linear(width, 3 * width), linear(width, width)
            self.gate, self.up = linear(width, hidden), linear(width, hidden)
            self.down = linear(hidden, width)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            # [B, T, 3, heads, head size], then each of the three as [B, heads, T, head size].
            qkv = self.qkv(self.norms[0](x)).view(B, T, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(B, T, width))
            h = self.norms[1](x)
            return x + self.down(functional.silu(self.gate(h)) * self.up(h))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(config.data.vocab_size, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.layers = nn.ModuleList(Layer() for _ in range(config.model.layers))
            self.norm = nn.RMSNorm(width)
            half = width // heads // 2
            frequency = config.model.rotary_base ** (-torch.arange(half) / half)
            angles = torch.arange(config.data.context)[:, None] * frequency
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, token, target):
            x = self.embedding(token)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            # Tied: the output layer is the embedding, transposed.
            logits = functional.linear(self.norm(x), self.embedding.weight)
            # All tokens at once, in float32: 12 GiB for 64 sequences of lm_124m.
            logits = logits.view(-1, logits.shape[-1]).float()
            return functional.cross_entropy(logits, target.reshape(-1))

    return Decoder()


if __name__ == "__main__":
    cli.run(main, required=("config",))
