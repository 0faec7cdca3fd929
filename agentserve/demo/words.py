"""The words that the demo's tasks are made of: file names, configuration keys, contents."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _split(
    """
    amber apple arrow autumn bamboo basin beacon birch bridge bronze butter cactus candle canyon carbon
    castle cedar cherry cinder circle cloud clover cobalt copper coral cotton crystal daisy dawn delta
    desert dragon eagle earth echo ember fabric falcon feather fern field flame forest fossil garden
    ginger glacier glass gold granite grape gravel green harbor hazel helmet honey horizon indigo iron
    island ivory jade jasmine jungle kettle lagoon lantern lemon lilac linen lunar magnet maple marble
    meadow mint mirror moon moss mountain nectar needle night north oak ocean olive onion orange orchid
    otter oxide oyster paper pearl pebble pepper pine planet plum pocket pollen prism quartz rabbit rain
    raven reef ribbon river robin rocket ruby saddle salmon sand sapphire shadow silver sky snow spice
    spring star stone storm sugar summer sunset tea temple thunder tiger timber tulip tunnel turtle
    valley velvet violet walnut water wheat willow winter wolf wood yellow zinc
    """
)
"""What files say and what configuration keys are set to."""

STEMS = _split(
    """
    notes list log data items names report draft diary index table stock orders users events tasks books
    songs recipes cities plants animals colors words memo plan budget journal archive letters tools
    parts
    """
)
"""Names of text files."""

CONFIG_STEMS = _split(
    """
    server client app shop store game camera router printer mail cache worker robot sensor engine
    """
)
"""Names of configuration files."""

NUMBER_KEYS = _split(
    """
    port size limit count width height depth price speed level rate weight timeout quota
    """
)
"""Configuration keys with numbers for values."""

WORD_KEYS = _split(
    """
    color mode owner theme format
    """
)
"""Configuration keys with words for values. No key is part of another key or of a word."""

MATCHES = _split(
    """
    error warning failed retry done
    """
)
"""First words of log lines."""

SYLLABLES = _split(
    """
    ba be bo ca co da di do fa fi ga go ka ki la li lo ma mi mo na ni no pa pi ra ri ro sa so ta ti to
    va vi za zo
    """
)
"""What made-up words are made of."""
