"""What the plots of policies show: their titles and the data of their lines."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrec.evaluation.plots import LOST, policy_figure, reranker_figure
from jaxrec.rl.logged.learn import IMITATION, PERMUTED, RERANKED, Point

SERVED = [
    {"step": step, "reward": 0.1 * step, "kl": 0.2, "kl_coefficient": 1.0, "entropy": 3.0, "coverage": 9.0}
    | {"ess_share": 0.5, "clipped_share": 0.25}
    for step in range(3)
]
SIMULATED = [
    {"step": 10, "reward": 0.3, "kl": 0.0, "kl_coefficient": 1.0, "entropy": 3.0, "coverage": 9.0}
    | {"likelihood_lost": -0.1},
    {"step": 20, "reward": 0.5, "kl": 0.1, "kl_coefficient": 2.0, "entropy": 2.0, "coverage": 8.0}
    | {"likelihood_lost": 0.2},
]


def panels(figure: Figure) -> dict[str, Axes]:
    """By title, those that show something."""
    return {axis.get_title(): axis for axis in figure.axes if axis.axison}


def lines(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """Their points by label; those without one, as at 0, are left out."""
    named = {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}
    return {name: list(zip(*map(list, line.get_data()), strict=True)) for name, line in named.items()}


def test_a_reranker_s_plot_has_all_fits_from_the_hybrid_on_and_the_frontier() -> None:
    ends = {IMITATION: (0.010, 0.01), RERANKED: (0.011, 0.03), PERMUTED: (0.010, 0.02)}
    halves = [
        Point(name, step, 1.0, step / 200 * ndcg, step / 200 * reward)
        for name, (ndcg, reward) in ends.items()
        for step in (100, 200)
    ]
    frontier = [Point(RERANKED, 200, weight, 0.01 - weight / 1000, 0.01 + weight / 100) for weight in (0.0, 1.0, 10.0)]
    found = panels(reranker_figure([one._asdict() for one in halves], [one._asdict() for one in frontier]))
    reward, ndcg, trade = found.values()
    assert list(found)[:2] == [f"{name} of held-out users" for name in ("Slate reward", "NDCG@10")]
    assert {axis.get_ylabel() for axis in (reward, ndcg)} == {"gain over the hybrid"}
    assert list(found)[2] == "Frontier, by weight of the rewards"
    for axis, place in ((ndcg, 0), (reward, 1)):
        assert lines(axis) == {name: [(0, 0), (100, end[place] / 2), (200, end[place])] for name, end in ends.items()}
    (line,) = trade.lines
    assert line.get_xdata().tolist() == [point.ndcg for point in frontier]
    assert line.get_ydata().tolist() == [point.reward for point in frontier]
    assert [text.get_text() for text in trade.texts] == ["0", "1", "10"]


def test_a_policy_from_a_server_s_log_has_importance_weights_and_no_costs() -> None:
    found = panels(policy_figure(SERVED))
    assert lines(found["Importance weights"]) == {
        "ess_share": [(0, 0.5), (1, 0.5), (2, 0.5)],
        "clipped_share": [(0, 0.25), (1, 0.25), (2, 0.25)],
    }
    assert lines(found["Mean reward of a slate"])["reward"] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert len(found) == 6
    assert not {LOST, "What the reward costs"} & set(found)


def test_a_policy_from_simulated_users_has_the_path_of_reward_and_lost_likelihood() -> None:
    found = panels(policy_figure(SIMULATED))
    assert lines(found["Weight of the KL penalty"])["kl_coefficient"] == [(10, 1.0), (20, 2.0)]
    assert lines(found[LOST])["likelihood_lost"] == [(10, -0.1), (20, 0.2)]
    path, last, _ = found["What the reward costs"].lines
    assert list(zip(path.get_xdata(), path.get_ydata(), strict=True)) == [(-0.1, 0.3), (0.2, 0.5)]
    assert (last.get_xdata()[0], last.get_ydata()[0]) == (0.2, 0.5)
    assert "Importance weights" not in found


def test_a_policy_without_records_has_an_empty_plot() -> None:
    assert not panels(policy_figure([]))
