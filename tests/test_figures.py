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


def test_a_long_stage_does_not_smooth_away_a_short_one():
    losses = [*[0.7] * 300, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    metrics = pd.DataFrame(dict(stage=[1] * 300 + [2] * 6, loss=losses, logratio_chosen=0.0, logratio_rejected=losses))
    thick = figures.plot_loss(metrics).axes[0].lines[3].get_ydata()
    assert len(thick) == 6 and thick[-1] < 0.5 < thick[0]
    rejected = figures.plot_drift(metrics).axes[0].lines[3].get_ydata()
    assert list(rejected) == pytest.approx([0.7, 0.65, 0.6, 0.55, 0.5, 0.4])     # of five steps
    plt.close("all")


def test_a_name_is_a_formula_only_where_it_is_one():
    assert [figures._as_formula(name) for name in ("M_3", "my_model", "my_best_v2", "lr_3")] == ["$M_{3}$", "my_model", "my_best_v2", "lr_3"]


def of_chunks(n, models=("M_0", "M_1"), pairs=3):
    return pd.DataFrame([dict(model=m, chunk=f"c{t}", gamma=i + s) for s, m in enumerate(models) for t in range(n) for i in range(pairs)])


def test_a_figure_of_many_chunks_or_sources_has_a_panel_for_each_and_no_long_row():
    assert [len(figures.plot_change(of_chunks(n)).axes) for n in (5, 6, 12)] == [1, 6, 12]
    sources = pd.DataFrame([dict(source=f"s{i}", model="m", mean=i, low=i - 1, high=i + 1) for i in range(10)])
    fig = figures.plot_models(sources)
    assert len(fig.axes) == 10 and fig.get_figwidth() < 12
    assert all(ax.xaxis.get_tick_params()["labelbottom"] for ax in fig.axes)
    plt.close("all")


def test_figures_say_what_is_wrong_with_their_rows():
    for plot in (figures.plot_gamma, figures.plot_change):
        with pytest.raises(ValueError, match="no rows to draw"): plot(of_chunks(0).reindex(columns=["model", "chunk", "gamma"]))
    with pytest.raises(ValueError, match="no rows to draw"): figures.plot_models(pd.DataFrame(columns=["source", "model", "mean", "low", "high"]))
    one_less = of_chunks(2).drop(index=9)
    with pytest.raises(ValueError, match="c1: not the same pairs, 3 under M_0, 2 under M_1"): figures.plot_change(one_less)
    plt.close("all")
