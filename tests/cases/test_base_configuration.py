"""The configuration that the other cases change: it trains, and goes on where it stopped."""


def test_the_base_configuration_trains(work):
    work.accepted("config", "base.yaml")
    work.accepted("train", "base.yaml")
    assert "resumed" in work.accepted("train", "base.yaml", "train.steps=3")
