"""A trained model from its checkpoint, with the features of the data that it is used with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from engine.kernels import choose_kernels
from engine.setup import pick_device, read_features, vectors_on_host
from files.atomic_io import DataError
from files.checkpoint import differences, load_checkpoint, load_weights
from files.data_folder import Manifest
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
        data_dir, manifest: the folder that it was trained on, or one of the same items.
        device, mm_emb_device, kernels, trust_pickle: as the flags of main.py.
        model_class: your own, if it was trained with one.

    Raises:
        DataError: no such checkpoint, or the data has other items or features than the model knows.
    """
    config, weights = read_model(path)
    check_data(path, data_dir, config, manifest)
    check_meanings(path, data_dir, config, manifest)
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
    kernels = choose_kernels(kernels, place, config)
    model = model_class(config, *features, on_host=on_host, kernels=kernels).to(place).eval()
    load_weights(model, weights, path)
    return model


def leaves_out_seen(choice: str, config: HSTUConfig) -> bool:
    """Whether seen items are left out, as --remove_seen says; "auto": as in the training."""
    return config.removes_seen if choice == "auto" else choice == "on"


def read_model(path: str | Path) -> tuple[HSTUConfig, Mapping[str, Tensor]]:
    """The config and the weights in a checkpoint."""
    content = load_checkpoint(path)
    config, weights = content["config"], content.get("weights")
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise DataError(f"{path}: not a checkpoint of this package (no config and weights in it)")
    try:
        return HSTUConfig(**config), weights
    except TypeError as error:  # a setting is missing or unknown
        raise DataError(f"{path}: {error}; export it with the version that trained it") from error


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
