"""From a config to the batches that a run reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, settings
from revnet_jax.data import Dataset, eval_batches, load_dataset, train_batches
from revnet_jax.data.text import Text, eval_windows, load_text, train_windows
from revnet_jax.families import family_of
from revnet_jax.training.sharding import local_rows


class Data(NamedTuple):
    """What a run reads. train: `(start_step) -> batches` without an end; test: `() -> batches`.

    Both are iterators to be closed, of this process's rows of each batch.
    """

    train: Callable[[int], Any]
    test: Callable[[], Any]
    record: dict[str, Any]


def build_data(config: ConfigDict, mesh: Mesh, eval_batch_size: int | None = None) -> Data:
    """Loads the data, checks that they are what the config says, and says how they are read.

    mesh: this process reads the rows of each batch that its devices there hold. eval_batch_size: in
    place of the config's, for the same examples.
    """
    data = config.data
    eval_batch_size = eval_batch_size or config.eval_batch_size

    def batches_of(size: int) -> dict[str, Any]:
        reading = {"num_threads": data.num_threads, "prefetch": data.prefetch}
        return {"batch_size": size, "rows": local_rows(mesh, size), **reading}

    if family_of(config).data == "text":
        if data.eval_batches < 0:
            raise ConfigError(
                f"config.data.eval_batches: got {data.eval_batches}, expected 0 (all) or more"
            )
        text = build_text(config)
        return Data(
            lambda step: train_windows(
                text,
                context=data.context,
                seed=config.seed,
                start_step=step,
                **batches_of(config.batch_size),
            ),
            lambda: eval_windows(
                text,
                context=data.context,
                max_windows=data.eval_batches * config.eval_batch_size,
                **batches_of(eval_batch_size),
            ),
            {
                "sha256": text.sha256,
                "bytes_per_token": text.bytes_per_token,
                "vocabulary": text.vocabulary._asdict(),
            },
        )
    dataset = build_dataset(config)
    return Data(
        lambda step: train_batches(
            dataset,
            seed=config.seed,
            start_step=step,
            crop_padding=data.crop_padding,
            flip=data.flip,
            min_crop_area=data.min_crop_area,
            **batches_of(config.batch_size),
        ),
        lambda: eval_batches(dataset, **batches_of(eval_batch_size)),
        {},
    )


def build_text(config: ConfigDict) -> Text:
    """Loads the text and checks that it is what the config says it is."""
    data = config.data
    with settings("data"):
        text = load_text(data.name, path=data.dir, train_share=data.train_share)
    size = text.vocabulary.size
    if data.vocab_size != size:
        raise ConfigError(
            f"config.data.vocab_size: got {data.vocab_size}, expected {size}, as in the data"
        )
    return text


def build_dataset(config: ConfigDict) -> Dataset:
    """Loads the data and checks that it is what the config says it is."""
    data = config.data
    with settings("data"):
        dataset = load_dataset(
            data.name,
            dir=data.dir or None,
            image_size=data.image_shape[0],
            verify_images=data.verify_images,
        )
    for name, got, expected in (
        ("image_shape", tuple(data.image_shape), dataset.image_shape),
        ("num_classes", data.num_classes, dataset.num_classes),
    ):
        if got != expected:
            raise ConfigError(f"config.data.{name}: got {got}, expected {expected}, as in the data")
    return dataset


def check_data_dir(config: ConfigDict) -> None:
    """Raises ConfigError for data that are somewhere, but the config does not say where."""
    name = config.data.name
    if not config.data.dir and name not in ("digits", "bytes"):
        raise ConfigError(f"config.data.dir: got none for {name}, expected where its files will be")
