"""Both environments as others' agents see them."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="the extra `gymnasium` is not installed")
from gymnasium.utils.env_checker import check_env  # noqa: E402

from bench.synthetic import acquired_taste, synthetic_environment  # noqa: E402
from jaxrec.config import RatingScale  # noqa: E402
from jaxrec.data.prepared import PreparedData  # noqa: E402
from jaxrec.rl.simulated.fit import fit_simulator, simulator_histories  # noqa: E402
from jaxrec.rl.simulated.gymnasium_adapter import GymnasiumEnvironment  # noqa: E402
from jaxrec.rl.simulated.users import simulator_environment  # noqa: E402
from tests.rl.simulated.simulated import genre_lovers  # noqa: E402


def synthetic() -> GymnasiumEnvironment:
    return GymnasiumEnvironment(synthetic_environment(acquired_taste()))


def test_synthetic_passes_gymnasiums_checks() -> None:
    check_env(synthetic(), skip_render_check=True)


def test_simulator_passes_gymnasiums_checks(small_data: PreparedData) -> None:
    histories, _ = simulator_histories(genre_lovers(small_data), small_data.catalog, small_data.users)
    fit = fit_simulator(histories, small_data.catalog.genre_matrix(), RatingScale(0.5, 5.0), 0.5)
    environment = GymnasiumEnvironment(simulator_environment(fit.params, 5))
    check_env(environment, skip_render_check=True)
    environment.reset(seed=0)
    observation, reward, terminated, truncated, info = environment.step(np.arange(1, 6))
    assert 0.5 * (info["taken"] + info["rating"]) == pytest.approx(reward)
    assert (observation["slot"] >= 0) == bool(info["taken"])
    assert not truncated
    assert isinstance(terminated, bool)


def test_seed_decides_the_visit() -> None:
    def visit(seed: int) -> list[float]:
        environment = synthetic()
        environment.reset(seed=seed)
        return [environment.step(1 + number % 40)[1] for number in range(60)]

    assert visit(3) == visit(3) != visit(4)


@pytest.mark.parametrize("action", [0, 41, "1"])
def test_what_is_no_action_is_refused(action: object) -> None:
    environment = synthetic()
    with pytest.raises(ValueError, match="before reset"):
        environment.step(1)
    environment.reset(seed=0)
    with pytest.raises(ValueError, match="expected one of Discrete"):
        environment.step(action)
