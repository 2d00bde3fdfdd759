"Chapter 07: what a colour means, and figures of nothing."
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from sdpo_nb import figures


def colours(fig):
    "Of all lines and bars of intervals."
    return {to_rgb(line.get_color()) for ax in fig.axes for line in ax.lines}


@pytest.mark.parametrize("T", [1, 2, 12])
def test_a_chunk_has_the_colour_of_its_stage_and_of_no_side(T):
    rows = [dict(model=f"M_{s}", chunk=f"c{t}", gamma=s * t + i * s / 9) for s in range(T + 1) for t in range(1, T + 1) for i in range(3)]
    changed = figures.plot_change(pd.DataFrame(rows))
    losses = figures.plot_loss(pd.DataFrame(dict(stage=range(1, T + 1), loss=0.5)))
    models = figures.plot_models(pd.DataFrame(dict(source=["a"], model=["m"], mean=[1.], low=[0.], high=[2.])))
    stages = {to_rgb(c) for c in figures._model_colors(T)[1:]}
    assert len(stages) == T and stages <= colours(changed) and stages <= colours(losses)
    sides = {to_rgb(c) for c in (figures.CHOSEN, figures.REJECTED)}
    for fig in (changed, losses, models): assert not sides & colours(fig)
    plt.close("all")


@pytest.mark.parametrize("plot", [figures.plot_loss, figures.plot_drift])
def test_a_run_without_steps_has_no_figure(plot):
    with pytest.raises(ValueError, match="metrics: no optimizer steps"): plot(pd.DataFrame(dict(stage=[], loss=[], logratio_chosen=[], logratio_rejected=[])))
