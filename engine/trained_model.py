"""A trained model from its checkpoint, with the features of the data that it is used with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from engine.kernels import choose_kernels
from engine.setup import pick_device, read_features, vectors_on_host
from files.atomic_io import DataError
from files.checkpoint import differences, load_checkpoint, load_weights
from files.data_folder import Manifest, digest_of_ids
from files.vocabulary import Vocabulary, read_vocabulary
from hstu_components import module_key
from model import HSTUConfig, HSTUModel

log = logging.getLogger("hstu")


def load_model(
    path: str | Path,
    data_dir: str | Path,
    manifest: Manifest,
    *,
    device: str = "cpu",
    mm_emb_device: str = "auto",
    kernels: str = "auto",
    trust_pickle: bool = False,
    model_class: type[HSTUModel] = HSTUModel,
) -> HSTUModel:
    """The model of a checkpoint with the features in a data folder, ready to predict.

    Args:
        path: a model_*.pt or resume_*.pt.
        data_dir, manifest: the folder that it was trained on, or one that extends it: with more
            items, action types or feature values after those of the training. Their vectors are
            zero, so a new item is known by its features alone.
        device, mm_emb_device, kernels, trust_pickle: as the flags of main.py; "auto" kernels are
            "plain" for a model that was trained with them.
        model_class: your own, if it was trained with one.

    Raises:
        DataError: no such checkpoint, or the data has other items or features than the model knows.
    """
    trained, weights, trained_with = read_model(path)
    config = extended(trained, data_dir, manifest, trust=trust_pickle)
    check_data(path, data_dir, config, manifest)
    check_meanings(path, data_dir, config, manifest)
    announce_new(path, data_dir, trained, config)
    sides = config.item_features, config.user_features
    vectors = [name for name, spec in sides[0].items() if spec["kind"] == "emb"]
    plain = [[name for name in side if name not in vectors] or ["none"] for side in sides]
    features = read_features(data_dir, manifest, *plain, vectors, trust_pickle)
    for specs, loaded in zip(sides, features, strict=True):
        known = {name: (spec["kind"], spec["size"]) for name, spec in specs.items()}
        found = {name: (feature.kind, feature.size) for name, feature in loaded.items()}
        refuse_other_data(path, data_dir, known, found)
    on_host = vectors_on_host(features[0], mm_emb_device)
    place = pick_device(device)
    if (kernels, trained_with) == ("auto", "plain"):  # its definition may be one of your own
        log.info("%s was trained with --kernels plain, and is used so", path)
        kernels = "plain"
    kernels = choose_kernels(kernels, place, config)
    model = model_class(config, *features, on_host=on_host, kernels=kernels).to(place).eval()
    load_weights(model, padded(weights, trained, config), path)
    return model


def leaves_out_seen(choice: str, config: HSTUConfig) -> bool:
    """Whether seen items are left out, as --remove_seen says; "auto": as in the training."""
    return config.removes_seen if choice == "auto" else choice == "on"


class SavedModel(NamedTuple):
    config: HSTUConfig
    weights: Mapping[str, Tensor]
    kernels: str | None  # that it was trained with, as of model.find_kernels; None: not known


def read_model(path: str | Path) -> SavedModel:
    """What a checkpoint says of its model."""
    content = load_checkpoint(path)
    config, weights = content["config"], content.get("weights")
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise DataError(f"{path}: not a checkpoint of this package (no config and weights in it)")
    try:
        return SavedModel(HSTUConfig(**config), weights, content.get("kernels"))
    except TypeError as error:  # a setting is missing or unknown
        raise DataError(f"{path}: {error}; export it with the version that trained it") from error


def extended(
    config: HSTUConfig, data_dir: str | Path, manifest: Manifest, *, trust: bool = False
) -> HSTUConfig:
    """The config with the numbers of data that extends the training's, else as it is.

    Such data has the training's items, action names and values of a feature, in their order, and
    then more of them.
    """
    known = config.item_ids_digest, config.feature_digests
    vocabulary = Vocabulary([], {}, manifest.action_names)
    if known != (manifest.item_ids_digest, manifest.feature_digests):
        vocabulary = read_vocabulary(data_dir, manifest, trust=trust)
    changes: dict[str, Any] = {}
    if extends(vocabulary.item_ids, config.num_items, config.item_ids_digest):
        changes |= {"num_items": manifest.num_items, "item_ids_digest": manifest.item_ids_digest}
    names, num_known = manifest.action_names or [], len(config.action_names or [])
    if num_known and names[:num_known] == config.action_names:
        counts = ("num_action_types", "num_target_action_types")
        changes |= {count: len(names) for count in counts if getattr(config, count)}
        changes["action_names"] = names
    digests = dict(config.feature_digests or {})
    for side in ("item_features", "user_features"):
        specs = changes[side] = dict(getattr(config, side))
        for i, spec in specs.items():
            values = vocabulary.feature_values.get(i, [])
            if extends(values, spec["size"], digests.get(i)):
                specs[i], digests[i] = spec | {"size": len(values)}, digest_of_ids(values)
    return replace(config, **changes, feature_digests=digests)


def extends(values: Sequence[Any], num_known: int, digest: str | None) -> bool:
    """Whether the first `num_known` of more values are those of the digest."""
    return len(values) > num_known and digest_of_ids(values[:num_known]) == digest


class Table(NamedTuple):
    """A table of the model with a row per item, action type or value of a feature."""

    what: str  # its rows are, for people
    weight: str  # name in the state dict
    size: int  # rows after row 0, which is that of the unknown
    feature_id: str | None = None  # of a feature's values


def tables(config: HSTUConfig) -> list[Table]:
    """The tables that grow with the data."""
    actions = {"action": config.num_action_types, "target_action": config.num_target_action_types}
    features = config.item_features | config.user_features
    coded = {i: s["size"] for i, s in features.items() if s["kind"] in ("sparse", "array")}
    found = [Table("items", "embedding_module.item_emb.weight", config.num_items)]
    for name, size in actions.items():
        found.append(Table("action types", f"input_preprocessor.{name}_emb.weight", size))
    for i, size in coded.items():
        found.append(Table(f"values of {i}", f"sparse_emb.{module_key(i)}.weight", size, i))
    return found


def padded(
    weights: Mapping[str, Tensor], trained: HSTUConfig, config: HSTUConfig
) -> dict[str, Tensor]:
    """The weights of the training, with rows of zeros for what is new in the data's `config`."""
    changed = dict(weights)
    for before, after in zip(tables(trained), tables(config), strict=True):
        if after.size > before.size and after.weight in weights:
            rows = (0, 0, 0, after.size - before.size)
            changed[after.weight] = F.pad(weights[after.weight], rows)
    return changed


def announce_new(
    path: str | Path, data_dir: str | Path, trained: HSTUConfig, config: HSTUConfig
) -> None:
    """A line that counts what the training did not know."""
    pairs = zip(tables(trained), tables(config), strict=True)
    new = {now.what: now.size - then.size for then, now in pairs if now.size > then.size}
    if found := ", ".join(f"{number:,} {what}" for what, number in new.items()):
        log.info("%s: new since the training of %s, without a vector: %s", data_dir, path, found)


def check_data(
    path: str | Path, data_dir: str | Path, config: HSTUConfig, manifest: Manifest
) -> None:
    """Refuse data whose items or action types are not those of the model's training."""
    known, found = {"items": config.num_items}, {"items": manifest.num_items}
    if config.item_ids_digest and manifest.item_ids_digest:  # an item, or their order, may differ
        known["digest of the item ids"] = config.item_ids_digest[:8]
        found["digest of the item ids"] = manifest.item_ids_digest[:8]
    if num_types := max(config.num_action_types, config.num_target_action_types):
        known["action types"] = num_types
        found["action types"] = max(num_types, manifest.num_action_types)
        if config.action_names and manifest.action_names:
            shared = min(num_types, manifest.num_action_types)  # the data may have fewer types
            known["action names"] = config.action_names[:shared]
            found["action names"] = manifest.action_names[:shared]
    refuse_other_data(path, data_dir, known, found)


def check_meanings(
    path: str | Path, data_dir: str | Path, config: HSTUConfig, manifest: Manifest
) -> None:
    """Refuse data in which a feature's numbers stand for other values than in the training."""
    known, found = config.feature_digests or {}, manifest.feature_digests or {}
    specs = config.item_features | config.user_features
    used = [i for i, spec in specs.items() if spec["kind"] != "emb"]
    if changed := [i for i in used if i in known and i in found and known[i] != found[i]]:
        raise DataError(
            f"{data_dir}: the values of feature {', '.join(changed)} are numbered or transformed "
            f"otherwise than in the data that {path} was trained on; train on this folder, or "
            "export from that one"
        )
    if unknown := [i for i in used if i not in known or i not in found]:
        log.info(
            "%s: what the numbers of feature %s stand for is not recorded; taken as the same as in "
            "the training", data_dir, ", ".join(unknown),
        )  # fmt: skip


def refuse_other_data(
    path: str | Path, data_dir: str | Path, known: Mapping[str, object], found: Mapping[str, object]
) -> None:
    if changed := "; ".join(differences(known, found)):
        raise DataError(f"{data_dir}: not the data that {path} was trained on: {changed}")
