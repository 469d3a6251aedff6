"""The picture of the server's page in docs/images, made by a headless Chromium.

    apt-get install chromium chromium-driver
    python -m bench.screenshot runs/demo/model

A user with some events is opened, a recommendation is clicked, and the items similar to another one are asked for.
"""

import tempfile
import time
from pathlib import Path

import click

from serve.client import RecommenderClient, UserEvent
from tests.serve.http.browser import WAIT_S, browser, missing
from tests.serve.process import running_server

# MovieLens: Toy Story, Pulp Fiction, The Shawshank Redemption, Jurassic Park, The Matrix
ITEMS = ("1", "296", "318", "480", "2571")
USER = "visitor"


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--item", "items", multiple=True, default=ITEMS, help="Items of the user's history, oldest first.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("docs/images/page.png"))
def main(model: Path, items: tuple[str, ...], out: Path) -> None:
    """Take the picture of a server on the model directory MODEL."""
    if missing():
        raise click.ClickException(missing())
    from selenium.webdriver.support.ui import WebDriverWait

    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(model, Path(folder) / "events.sqlite", options=("--http", "127.0.0.1:0")) as server,
        browser(1400, 1130) as driver,
    ):
        start = int(time.time()) - 86_400
        with RecommenderClient(server.address) as client:
            client.record_events(
                UserEvent(event_id=str(at), user_id=USER, item_id=item, rating=4.5, timestamp=start + 3600 * at)
                for at, item in enumerate(items)
            )

        def after(script: str, serial: int) -> None:
            driver.execute_script(script)
            WebDriverWait(driver, WAIT_S).until(
                lambda _: driver.execute_script("return $('recommendations').dataset.serial") == str(serial)
            )

        def settled(condition: str) -> None:
            WebDriverWait(driver, WAIT_S).until(
                lambda _: driver.execute_script(f"return !document.getAnimations().length && {condition}")
            )

        driver.get(f"{server.line.split(' and ')[1].split(' ')[0]}/#user={USER}")
        after("", 1)
        settled("document.querySelectorAll('#events button').length > 0")
        after("document.querySelector('#recommendations .title').click()", 2)
        driver.execute_script(
            "for (const one of [...document.querySelectorAll('.why details')].slice(2)) one.open = false;"
            "for (const id of ['profile', 'models', 'trending']) $(id).open = true;"
            "document.querySelector('#recommendations .actions button:last-child').click();"
        )
        settled("$('similar-items').children.length > 0 && $('model-list').children.length > 0")
        driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
        out.write_bytes(driver.get_screenshot_as_png())
    click.echo(f"{out}: {out.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
