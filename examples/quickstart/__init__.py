"""The quickstart: a tiny model, a task with many right answers, GRPO against Policy Split."""
