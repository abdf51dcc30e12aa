"""Plot of the loss terms of a run, beside Ultralytics' own plots."""

from __future__ import annotations

from pathlib import Path

from ultralytics.utils import plt_settings


@plt_settings()
def plot_losses(results: dict[str, list[float]], file: Path, gains: dict[str, float] | None = None) -> None:
    """Plot the loss terms with their chance levels, their shares of the gradient, and the clipped and skipped steps.

    Args:
        results (dict[str, list[float]]): Columns of results.csv, including those of the loss monitor.
        file (Path): Image to write.
        gains (dict[str, float], optional): Gains of the terms; the axis on the right shows the values without gain.
    """
    import matplotlib.pyplot as plt  # as Ultralytics does, where it is needed

    terms = [k.removeprefix("share/") for k in results if k.startswith("share/")]
    x = results["epoch"]
    colors = {t: plt.get_cmap("tab10")(i) for i, t in enumerate(terms)}
    n = (len(terms) + 4) // 2
    fig, axes = plt.subplots(2, n, figsize=(3.2 * n, 6.4), layout="constrained")
    axes = axes.ravel()

    shares = [results[f"share/{t}"] for t in terms]
    axes[0].stackplot(x, shares, labels=terms, colors=colors.values())
    axes[0].set(title="gradient shares at the neck", xlim=(x[0], x[-1] if len(x) > 1 else x[0] + 1), ylim=(0, 1))
    if len(x) == 1:  # an area needs two points
        axes[0].stackplot([x[0], x[0] + 1], [[s[0]] * 2 for s in shares], colors=colors.values())
    axes[0].legend(*(h[::-1] for h in axes[0].get_legend_handles_labels()), fontsize=8, loc="center left")

    for t in terms:
        axes[1].plot(x, [max(v, 1e-12) for v in results[f"grad/{t}"]], color=colors[t], marker=".", label=t)
    axes[1].plot(x, results["train/grad_norm"], color="black", marker=".", label="all weights")
    axes[1].set(title="gradient norm", yscale="log")
    axes[1].legend(fontsize=8)

    for k, style in (
        ("clipped", "-"),
        ("skipped", "-"),
        ("overflows", "--"),
        ("sides_clamped", ":"),
        ("means_clamped", ":"),
    ):
        axes[2].plot(x, results[f"train/{k}"], style, marker=".", label=k.replace("_", " "))
    axes[2].set(title="events per epoch")
    axes[2].set_yscale("symlog", linthresh=1)
    axes[2].legend(fontsize=8)

    for ax, t in zip(axes[3:], terms):
        ax.plot(x, results[f"train/{t}_loss"], color=colors[t], marker=".", label="train")
        if any(results[f"chance/{t}"]):
            ax.plot(x, results[f"chance/{t}"], "--", color="gray", label="chance")
        ax.set(title=f"{t}_loss", ylim=(0, None))
        if gain := (gains or {}).get(t):
            raw = ax.secondary_yaxis("right", functions=(lambda v, g=gain: v / g, lambda v, g=gain: v * g))
            raw.set_ylabel(f"without gain {gain:g}", fontsize=7)
        ax.legend(fontsize=8)
    for ax in axes:
        ax.set_xlabel("epoch", fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[3 + len(terms) :]:
        ax.set_visible(False)
    fig.savefig(file, dpi=200)
    plt.close(fig)
