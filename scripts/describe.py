"""Describes a config's model and the memory that each strategy would need; trains nothing.

python scripts/describe.py --config=configs/cifar10_revnet110.py --json
"""

import json

from absl import flags

from revnet_jax.config import cli

CONFIG = cli.define_config_flag()
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")


def main(argv):
    del argv
    # Imported after the flags are checked, because JAX takes seconds to import.
    from revnet_jax.training.describe import describe_model

    report = describe_model(CONFIG.value)
    print(json.dumps(report, indent=2) if JSON.value else as_text(report))


def as_text(report):
    example = (
        f"{name} {'x'.join(map(str, shape)) or 'scalar'}"
        for name, shape in report["example"].items()
    )
    lines = [
        f"{report['family']}: {report['num_params']:,} parameters; {', '.join(example)}",
        "",
        "chain       layers  backprop     stored layers",
        *(
            f"{c['name']:10}  {c['layers']:6}  {c['backprop']:11}  "
            f"{'-1, as many as fit' if c['stored_layers'] is None else c['stored_layers']}"
            for c in report["chains"]
        ),
        "",
        "strategy    activations kept per example",
    ]
    for strategy, kept in report["activation_bytes_per_example"].items():
        amount = "no inverse" if kept is None else f"{kept / 2**20:.2f} MiB"
        lines.append(f"{strategy:10}  {amount}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, required=("config",))
