"""The table of configuration keys that the plugin adds: name, type, default, range and one line of help."""

from __future__ import annotations

from typing import Any, NamedTuple


class Key(NamedTuple):
    """One configuration key.

    Attributes:
        kind (type): int, float, bool or str; Ultralytics checks it.
        default (Any): Value if neither the recipe nor the user sets one.
        help (str): One line for examples/keys.md.
        low (float): Minimum valid value of a number.
        high (float): Maximum valid value of a number.
        above (bool): Whether `low` itself is invalid.
        choices (tuple[str, ...]): Valid values of a str.
    """

    kind: type
    default: Any
    help: str
    low: float = 0
    high: float = float("inf")
    above: bool = False
    choices: tuple[str, ...] = ()


KEYS: dict[str, Key] = {
    "stage": Key(int, None, "1: ordinary training of the few-shot head; 2: episodes; 3: new classes from shots", 1, 3),
    "n_way": Key(int, 8, "classes drawn per episode", 1),
    "k_shot": Key(int, 1, "support images per drawn class", 1),
    "n_query": Key(int, 1, "query images per drawn class", 1),
    "episodes": Key(int, 500, "episodes, each one optimizer step, per epoch", 1),
    "wide": Key(bool, True, "every class with a support object is a way, not only the drawn classes"),
    "turned": Key(
        float, 0.5, "share of the episodes whose images are all rotated or mirrored, which makes new classes", high=1
    ),
    "supcon": Key(float, 0.0, "gain of the SupCon term, such as 1.2"),
    "supcon_tau": Key(float, 0.1, "temperature of the SupCon term", above=True),
    "cpe": Key(float, 0.0, "gain of the CPE term, contrastive proposal encoding, such as 0.6"),
    "cpe_tau": Key(float, 0.2, "temperature of the CPE term", above=True),
    "cpe_iou": Key(float, 0.5, "minimum IoU of an anchor in the CPE term", high=1),
    "cpe_weight": Key(
        str, "none", "weight of an anchor in the CPE term as a function of its IoU", choices=("none", "linear", "exp")
    ),
    "triplet": Key(float, 0.0, "gain of the triplet term, such as 0.3"),
    "triplet_margin": Key(float, 0.3, "margin of the triplet term, in cosine distance"),
    "triplet_soft": Key(bool, False, "soft margin, log(1 + e^x), in place of the hinge of the triplet term"),
    "terms": Key(str, None, "loss terms of your own: dotted paths of `EpisodeTerm` classes, separated by commas"),
    "meta_val": Key(
        float,
        None,
        "share of the classes that stages 1 and 2 keep out of training; their AP50 from 1 and 5 shots picks best.pt",
        high=0.5,
    ),
    "dfl_side_max": Key(float, 20.0, "maximum DFL of one side of a box", above=True),
    "dfl_mean_max": Key(float, 15.0, "maximum mean DFL of a batch, four sides summed", above=True),
    "dfl_clamp_mode": Key(str, "hard", "gradient above a clamp: zero, or scaled down", choices=("hard", "rescale")),
    "grad_clip": Key(float, 5.0, "maximum gradient norm of the loss itself, not multiplied by batch size", above=True),
    "graft": Key(
        str,
        "neck",
        "what the new classes of stage 3 get of their own: head, neck (and head, C2PSA), or all layers; none: nothing",
        choices=("head", "neck", "all", "none"),
    ),
    "base_replay": Key(str, None, "data.yaml whose train images make half of each batch of stage 3"),
    "blend": Key(
        float,
        None,
        "stage 3 with graft=none: weight of the trained model in the final interpolation; 0.75, with one shot 0.5",
        high=1,
    ),
    "teacher": Key(
        float, 0.5, "stage 3 with graft=none: gain of the distillation term, for the classes without a label"
    ),
    "memory": Key(
        float,
        0.5,
        "stage 3 with graft=none: gain of the replay term, for the same classes on the stored anchors of base images",
    ),
    "steps": Key(
        int,
        None,
        "optimizer steps of stage 3; 300, or 60 passes over the shots if that is more (30 beside other images)",
        1,
    ),
    "nonfinite": Key(
        str, "skip", "a step whose loss or gradient is NaN or Inf: skip it, or raise", choices=("skip", "raise")
    ),
    "nonfinite_limit": Key(int, 10, "number of such steps in a row after which training stops", 1),
    "doctor": Key(int, 50, "the loss monitor measures the gradient of every term every x batches; 0 for never"),
}

# Keys that work in any training, stock models included; keys that all stages use; and keys of stage 3.
GUARD = ("grad_clip", "nonfinite", "nonfinite_limit")
EVERY_STAGE = ("nonfinite", "nonfinite_limit", "doctor")
SHOT_KEYS = ("graft", "base_replay", "steps")
FINE_TUNING = ("blend", "teacher", "memory")  # with graft=none
ADAPTING = (*SHOT_KEYS, *FINE_TUNING)

# Keys of predict, track, val and export.
ENROLL_KEYS: dict[str, Key] = {
    "support": Key(str, None, "support set to enroll: data.yaml, .txt list, folder of crops by class, or an image"),
    "enroll": Key(str, None, "how: auto (default), mean or fit", choices=("auto", "mean", "fit")),
    "background": Key(
        str, None, "images without the classes to enroll, whose anchors are negatives: folder or .txt list"
    ),
    "objects": Key(
        str,
        None,
        "objects in the image of support=, such as 'scooter 10 20 200 300', with corners in pixels; separated by ';'",
    ),
}

ALL_KEYS = {**KEYS, **ENROLL_KEYS}

# Ultralytics' own gains, which Ultralytics does not check.
STOCK_GAINS = ("box", "cls", "dfl")


def used(args: dict[str, Any]) -> list[str]:
    """Return the keys of the table that a configuration sets to a value other than None.

    Args:
        args (dict[str, Any]): A configuration or overrides.

    Returns:
        (list[str]): Names in the order of the table.
    """
    return [k for k in KEYS if args.get(k) is not None]


def check(args: dict[str, Any]) -> None:
    """Check the ranges of the keys and of Ultralytics' gains; Ultralytics' `check_cfg` checks types.

    Args:
        args (dict[str, Any]): A configuration; keys with the value None are skipped.

    Raises:
        ValueError: If a value is out of its range.
    """
    for k in STOCK_GAINS:
        if args.get(k) is not None and args[k] < 0:
            raise ValueError(f"'{k}={args[k]}' is an invalid value. '{k}' must be >= 0.")
    for k, key in ALL_KEYS.items():
        v = args.get(k)
        if v is None:
            continue
        if key.choices and v not in key.choices:
            raise ValueError(f"'{k}={v}' is an invalid value. Valid '{k}' values are {', '.join(key.choices)}.")
        if key.kind not in {int, float}:
            continue
        if key.high < float("inf") and not key.low <= v <= key.high:
            raise ValueError(f"'{k}={v}' is an invalid value. Valid '{k}' values are between {key.low} and {key.high}.")
        if not (v > key.low if key.above else v >= key.low) or v == float("inf"):
            sign = ">" if key.above else ">="
            raise ValueError(f"'{k}={v}' is an invalid value. '{k}' must be finite and {sign} {key.low}.")


# Values of Ultralytics' own keys in a stage whose recipe is not given: the clamped DFL of stage 2 is the sum of four
# sides, of which Ultralytics takes the mean; and results are reported on the val split, so it must not choose a model.
STAGE_DEFAULTS: dict[int, dict[str, Any]] = {2: {"dfl": 0.15}, 3: {"val": False}}


def place_of(key: str) -> str:
    """Return the settings with which a key has an effect, for messages.

    Args:
        key (str): One of our keys of a stage.

    Returns:
        (str): Recipe and value, such as 'cfg=stage3.yaml graft=none'.
    """
    if key in ADAPTING:
        return f"cfg=stage3.yaml{' graft=none' if key in FINE_TUNING else ''}"
    return "cfg=stage1.yaml or cfg=stage2.yaml" if key == "meta_val" else "cfg=stage2.yaml"


def grafts(args: dict[str, Any]) -> bool:
    """Return whether a training grafts, i.e. is stage 3 with another `graft` than 'none'.

    Args:
        args (dict[str, Any]): A configuration or overrides.
    """
    return args.get("stage") == 3 and (args.get("graft") or KEYS["graft"].default) != "none"


def refuse_support(args: dict[str, Any]) -> None:
    """Refuse a support set in training; only grafting takes background images.

    Args:
        args (dict[str, Any]): A configuration or overrides.

    Raises:
        ValueError: If a key of enrollment is set, or `background` without grafting.
    """
    for k in ENROLL_KEYS:
        if args.get(k) is None or (k == "background" and grafts(args)):
            continue
        if k == "background":
            way = "Leave graft=none out" if args.get("stage") == 3 else "Add cfg=stage3.yaml"
            raise ValueError(f"'{k}={args[k]}' works in grafting alone. {way} to graft, or leave it out.")
        raise ValueError(
            f"'{k}={args[k]}' is not a training argument. To add classes from a few examples, train without it and use "
            "it with predict, track, val or export; to train on them, make them the train split of data=."
        )


def need_support(args: dict[str, Any]) -> None:
    """Refuse keys of enrollment without a support set, which would have no effect.

    Args:
        args (dict[str, Any]): Arguments of predict, track, val or export.

    Raises:
        ValueError: If `enroll`, `background` or `objects` is set and `support` is not.
    """
    alone = [f"'{k}={args[k]}'" for k in ENROLL_KEYS if args.get(k) is not None]
    if alone and args.get("support") is None:
        raise ValueError(f"{', '.join(alone)} needs support=, the labeled examples to enroll, e.g. support=shots.yaml.")


def need_stage(args: dict[str, Any]) -> None:
    """Refuse keys of a stage if no stage is given, since a key alone must not change an ordinary training.

    Args:
        args (dict[str, Any]): A configuration or overrides.

    Raises:
        ValueError: If there are such keys.
    """
    keys = [k for k in used(args) if k not in {*GUARD, *EVERY_STAGE}]
    if keys and args.get("stage") is None:
        stages = "3" if set(keys) & set(ADAPTING) else "12" if keys == ["meta_val"] else "2"
        named = ", ".join(f"'{k}={args[k]}'" for k in keys)
        recipes = " or ".join(f"cfg=stage{x}.yaml" for x in stages)
        raise ValueError(
            f"{named} belongs to stage {' or '.join(stages)}, and no stage is given. Add {recipes}, or leave it out "
            "for an ordinary training."
        )


def resolve(args: dict[str, Any]) -> dict[str, Any]:
    """Return the values of all keys in a training run.

    The stage is the given one, else 1. Keys of the stage and of `EVERY_STAGE` that are not given take the default.

    Args:
        args (dict[str, Any]): A configuration that passed `check`.

    Returns:
        (dict[str, Any]): A value (or None) for every key of the table.

    Raises:
        ValueError: If keys of a stage are set and no stage is.
    """
    need_stage(args)
    given = {k: args.get(k) for k in KEYS}
    stage = given["stage"] or 1
    own = {1: (), 2: [k for k in KEYS if k not in ADAPTING], 3: ADAPTING}[stage]
    defaults = {k: KEYS[k].default for k in (*own, *EVERY_STAGE)}
    return {**given, **{k: v for k, v in defaults.items() if given[k] is None}, "stage": stage}


def episode_size(args: dict[str, Any]) -> int:
    """Return the number of images of an episode, n_way x (k_shot + n_query).

    Args:
        args (dict[str, Any]): A resolved configuration of stage 2.

    Returns:
        (int): Support and query images together.
    """
    return args["n_way"] * (args["k_shot"] + args["n_query"])
