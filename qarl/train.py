"""Train: `python -m qarl.train recipe=NAME key=value …`; `--help` shows the groups and every key.

`plan=true` prints memory and placement and stops. Torch is imported only after all of that.
"""

from qarl.cli import launch
from qarl.config import RunConfig


def train(config: RunConfig) -> None:
    if config.plan:
        from qarl.plan import plan

        print(plan(config))
        return
    from qarl.loop import run

    run(config)


if __name__ == "__main__":
    launch(train, "train")
