"""The progress bar of a run: images per second, the share of time that waits for data, and the time left."""

from tqdm import tqdm

TIMED_STEPS = 5  # after the first step; enough to tell minutes from hours
WARM_UP_STEPS = 1  # the first step allocates memory and chooses algorithms, and takes several times as long


class Meter:
    """Adds up the seconds of steps, and those of them that were spent waiting for data."""

    def __init__(self, images: int) -> None:
        self.images = images  # of one step
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, seconds: float, waited: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.waited += waited

    @property
    def images_per_second(self) -> float:
        return self.steps * self.images / max(self.seconds, 1e-9)

    @property
    def share_waited(self) -> float:
        return self.waited / max(self.seconds, 1e-9)


class Progress:
    """A bar over all steps of a run. Prints after the first steps how long the run will take."""

    def __init__(self, step: int, steps: int, images: int, quiet: bool) -> None:
        self.bar = tqdm(total=steps, initial=step, unit="step", desc="training", disable=quiet, smoothing=0.1)
        self.quiet = quiet
        self.images = images
        self.first = step
        self.steps = steps
        self.estimate = Meter(images)
        self.recent = Meter(images)

    def step(self, number: int, epoch: str, loss: float, seconds: float, waited: float) -> None:
        """Show that step `number`, counted from 1, is done."""
        done = number - self.first
        if WARM_UP_STEPS < done <= WARM_UP_STEPS + TIMED_STEPS:
            self.estimate.add(seconds, waited)
            if self.estimate.steps == TIMED_STEPS and number < self.steps:
                left = (self.steps - number) * self.estimate.seconds / TIMED_STEPS
                self.say(
                    f"{self.steps:,} steps of {self.images} images; at the pace of the first ones, "
                    f"{self.estimate.images_per_second:.0f} images/s, the rest takes about {duration(left)}, "
                    "and scoring comes on top"
                )
        self.recent.add(seconds, waited)
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(
            f"loss={loss:.3f}, {self.recent.images_per_second:.0f} images/s, {self.recent.share_waited:.0%} data wait",
            refresh=False,
        )
        if self.recent.steps >= 20:
            self.recent = Meter(self.images)
        self.bar.update()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            tqdm.write(line)

    def close(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Seconds in words, as exactly as an estimate deserves."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
