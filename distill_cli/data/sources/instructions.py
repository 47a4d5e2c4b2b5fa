"""Short requests in plain English about everyday topics: prompts for a small chat model, without answers to check.

    What is a lighthouse used for?
    Give me two tips for learning to swim.

Each is a template of a kind with a topic of that kind. The splits have different topics: none of the validation's
requests is about what a training request is about.
"""

import hashlib
import random

from distill_cli.errors import ConfigError
from distill_cli.types import Example

TEMPLATES = {
    "thing": (
        "What is {} used for?",
        "Describe {} in one sentence.",
        "Where would you find {}?",
        "Who might need {}, and why?",
        "Write a short riddle whose answer is {}.",
        "Explain to a child what {} is.",
        "Write two sentences about {}.",
        "How would you clean {}?",
        "Give three words that describe {}.",
        "Write a short advertisement for {}.",
        "Begin a story in which someone finds {}.",
        "What could go wrong with {}?",
    ),
    "subject": (
        "Tell me what you know about {}.",
        "Explain {} in simple words.",
        "Why should I care about {}?",
        "Tell me an interesting fact about {}.",
        "Write one paragraph about {}.",
        "What should a beginner know about {}?",
        "Ask me a question about {}.",
        "Summarize what people know about {}.",
        "How would you teach someone about {}?",
        "What do people often get wrong about {}?",
        "Write the first sentence of a book about {}.",
        "Name three things that have to do with {}.",
    ),
    "place": (
        "Where is {}?",
        "What is {} known for?",
        "Describe the weather in {}.",
        "What should a visitor see in {}?",
        "Write a postcard from {}.",
        "What do people in {} like to eat?",
        "Tell me something about the history of {}.",
        "Would you like to live in {}? Why?",
        "Plan a day in {}.",
        "Write one sentence about {}.",
    ),
    "activity": (
        "Give me two tips for {}.",
        "What do I need for {}?",
        "Why do people enjoy {}?",
        "What is hard about {}?",
        "How do I start {}?",
        "Write a short message that invites a friend to try {}.",
        "Is {} good for your health?",
        "Describe a bad day of {}.",
        "List three mistakes to avoid when {}.",
        "How long does it take to become good at {}?",
    ),
}
TOPICS = {
    "thing": (
        "a bicycle, a lighthouse, an umbrella, a wooden spoon, a compass, a telescope, a raincoat, a sewing machine, "
        "a candle, a wristwatch, a suitcase, a hammer, a road map, a teapot, a pair of glasses, a rope, a mirror, "
        "a notebook, a bucket, a ladder, a tent, a lamp, a microscope, a whistle, a blanket, a guitar, a piano, "
        "a drum, a kite, a sled, a canoe, a lawn mower, a vacuum cleaner, a refrigerator, a toaster, an oven, "
        "a washing machine, a fire extinguisher, a smoke detector, a first aid kit, a calculator, a keyboard, "
        "a printer, a camera, a microphone, a radio, a battery, a magnet, a thermometer, a bridge, a windmill, "
        "a greenhouse, a fountain, a bench, a mailbox, a traffic light, a school bus, a fire truck, a tractor, "
        "a helicopter, a submarine, a sailing boat, a wheelbarrow, a shovel, a pair of scissors, a needle, a button, "
        "a zipper, a scarf, a pair of gloves, a helmet, a backpack, a wallet, a key, a door lock, a pillow, "
        "a mattress, a curtain, a carpet, a broom, a sponge, a bar of soap, a toothbrush, a comb, a frying pan, "
        "a kitchen knife, a cutting board, a rolling pin, a measuring cup, a corkscrew, a water bottle, a lunch box"
    ),
    "subject": (
        "gravity, photosynthesis, electricity, the water cycle, the moon, the solar system, volcanoes, earthquakes, "
        "rain, snow, the ocean, rivers, deserts, forests, bees, whales, penguins, elephants, dogs, cats, horses, "
        "spiders, dinosaurs, the human heart, the brain, sleep, vitamins, vaccines, bacteria, the immune system, "
        "democracy, money, banks, taxes, insurance, inflation, trade, the Roman Empire, the Aztecs, "
        "the Middle Ages, the printing press, the steam engine, the telephone, the internet, computers, robots, "
        "solar power, wind power, nuclear energy, recycling, climate change, plastic, steel, glass, paper, cotton, "
        "wool, bread, cheese, coffee, tea, chocolate, salt, sugar, rice, honey, olive oil, fractions, prime numbers, "
        "probability, geometry, the alphabet, grammar, poetry, theater, opera, jazz, painting, sculpture, "
        "photography, architecture, football, chess, the Olympic Games, friendship, honesty, courage, patience, "
        "kindness, memory, dreams, laughter, music, dance, holidays, birthdays, weddings, school, libraries, museums"
    ),
    "place": (
        "Paris, London, Rome, Berlin, Madrid, Vienna, Athens, Lisbon, Dublin, Amsterdam, Stockholm, Oslo, Helsinki, "
        "Prague, Warsaw, Budapest, Istanbul, Cairo, Nairobi, Cape Town, Marrakesh, Dubai, Mumbai, Bangkok, Singapore, "
        "Tokyo, Kyoto, Seoul, Beijing, Shanghai, Sydney, Auckland, New York, Chicago, San Francisco, New Orleans, "
        "Toronto, Vancouver, Mexico City, Havana, Lima, Buenos Aires, Rio de Janeiro, Iceland, Norway, Scotland, "
        "Switzerland, Italy, Greece, Portugal, Egypt, Kenya, India, Japan, Brazil, Canada, Australia, Alaska, Hawaii"
    ),
    "activity": (
        "learning to swim, riding a bicycle, baking bread, growing tomatoes, writing a diary, learning a language, "
        "playing the piano, painting with watercolors, running in the morning, hiking in the mountains, camping, "
        "fishing, sailing, skiing, ice skating, dancing, singing in a choir, knitting, sewing, woodworking, "
        "repairing a bicycle, cooking for a large family, saving money, moving to a new city, looking for a job, "
        "preparing for an exam, giving a speech, teaching children, training a puppy, looking after a cat, "
        "keeping chickens, watching birds, taking photographs, collecting stamps, solving puzzles, playing chess, "
        "reading before bed, meditating, doing yoga, lifting weights, playing tennis, playing basketball, climbing, "
        "traveling by train, driving at night, working from home, organizing a party, cleaning the house, "
        "writing letters, volunteering"
    ),
}
SPLITS = {"validation": range(20), "train": range(20, 100)}
"""The hundredths of all topics that a split has."""


def load(*, split: str, size: int, seed: int = 0) -> list[Example]:
    """Return `size` different requests of a split, the same on every machine; a smaller size gives the first ones.

    Raises:
        ConfigError: no such split, or too few requests in it.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split}: must be one of {', '.join(SPLITS)}")
    found = [
        template.format(topic)
        for kind, topics in TOPICS.items()
        for topic in topics.split(", ")
        if _hundredth(topic) in SPLITS[split]
        for template in TEMPLATES[kind]
    ]
    if not 1 <= size <= len(found):
        raise ConfigError(f"size={size}: must be between 1 and {len(found)}, the requests of split={split}")
    random.Random(f"{split}-{seed}").shuffle(found)
    return [Example(request) for request in found[:size]]


def _hundredth(topic: str) -> int:
    return int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8]) % 100
