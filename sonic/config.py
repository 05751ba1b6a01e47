"""Everything that is a setting, and nothing that computes: constants of the method, presets, model and run configuration."""

SAMPLE_RATE = 16_000  # Hz; Whisper's input rate
TICK_RATE = 25  # the method's clock: video ticks per second of speech
SAMPLES_PER_TICK = SAMPLE_RATE // TICK_RATE  # 640
FEATURES_PER_TICK = 2  # Whisper's encoder gives 50 features per second


class UserError(ValueError):
    """Something the person at the keyboard can mend. The scripts print its one sentence and exit with code 2."""
