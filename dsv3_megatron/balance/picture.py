"""The picture of a plan: the load of each GPU, before and after, layer by layer."""

from pathlib import Path

from dsv3_megatron.balance.plan import Plan, max_over_mean

__all__ = ["draw"]


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG: two maps of layers × GPUs in units of the mean, and the fullest GPU of each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    loads = {"before": plan.before, "after": plan.after}
    relative = {name: load / load.mean(1, keepdim=True).clamp(min=1e-30) for name, load in loads.items()}
    top = max(1.05, *(float(load.max()) for load in relative.values()))
    height = max(3.0, 0.18 * len(plan.layers) + 1.5)
    figure, axes = pyplot.subplots(
        1, 3, figsize=(13, height), width_ratios=(3, 3, 2), layout="constrained", sharey=True
    )
    rows = range(len(plan.layers))
    for axis, (name, load) in zip(axes, relative.items(), strict=False):
        image = axis.imshow(
            load.numpy(), aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest"
        )
        axis.set_title(name)
        axis.set_xlabel("GPU")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes[1], label="tokens over the mean")
    for name, load in loads.items():
        axes[2].plot(max_over_mean(load), rows, marker="o", markersize=3, label=name)
    axes[2].axvline(1.0, color="grey", linewidth=0.8)
    axes[2].set_xlabel("fullest GPU over the mean")
    axes[2].legend(frameon=False)
    step = max(1, len(plan.layers) // 20)
    axes[0].set_yticks(rows[::step], [str(number) for number in plan.layers[::step]])
    axes[0].set_ylabel("layer")
    figure.suptitle(
        f"{plan.phy2log.shape[1]} expert slots on {plan.gpus} GPUs, {plan.nodes} nodes"
        f" ({'hierarchical' if plan.hierarchical else 'global'})"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
