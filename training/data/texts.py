"""What the voices say: sentences in five languages, and sentences put together from words."""

from __future__ import annotations

import numpy as np

VOICES: dict[str, tuple[str, ...]] = {
    "en": ("en-us", "en", "en-gb-scotland", "en-us-nyc"),
    "de": ("de",),
    "es": ("es", "es-419"),
    "fr": ("fr",),
    "it": ("it",),
}
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f3", "f4", "f5", "Annie", "linda")
HELD_OUT_VARIANTS = ("m6", "steph", "max", "belinda")  # never trained on

SENTENCES: dict[str, tuple[str, ...]] = {
    "en": (
        "Hello! I am only a drawing, but I can talk to you for as long as you like.",
        "The quick brown fox jumps over the lazy dog.",
        "My mum bought five fish and a big blue boat.",
        "Please call Stella and ask her to bring these things from the store.",
        "We were away a year ago, and nobody knew why.",
        "She sells sea shells by the sea shore.",
        "How much wood would a woodchuck chuck?",
        "People move their lips when they speak, even in a whisper.",
        "The north wind and the sun were disputing which was the stronger.",
        "Good morning, everybody! What a beautiful day it is outside.",
        "Peter Piper picked a peck of pickled peppers.",
        "I wonder whether the weather will be better on Wednesday.",
        "Open the window, please. It is far too warm in here.",
        "Thank you very much. Goodbye, and see you tomorrow.",
        "One, two, three, four, five, six, seven, eight, nine, ten.",
        "May I have a cup of tea, maybe with some milk?",
    ),
    "de": (
        "Guten Tag, ich heiße Anna und wohne über dem Bach.",
        "Der Nordwind und die Sonne stritten sich, wer stärker sei.",
        "Fischers Fritz fischt frische Fische.",
        "Möchten Sie einen Kaffee mit Milch und Zucker?",
        "Papa und Mama backen am Abend Apfelkuchen.",
    ),
    "es": (
        "Buenos días, me llamo Pablo y vivo en Bogotá.",
        "El viento norte y el sol porfiaban sobre cuál era el más fuerte.",
        "Tres tristes tigres tragaban trigo en un trigal.",
        "Mi mamá me mima y yo la quiero mucho.",
    ),
    "fr": (
        "Bonjour, je m'appelle Paul et j'habite à Bordeaux.",
        "La bise et le soleil se disputaient, chacun assurant qu'il était le plus fort.",
        "Un chasseur sachant chasser sait chasser sans son chien.",
        "Voulez-vous boire un peu de thé avec nous?",
    ),
    "it": (
        "Buongiorno, mi chiamo Paola e abito a Bologna.",
        "Si bisticciavano un giorno il vento di tramontana e il sole.",
        "Sopra la panca la capra campa, sotto la panca la capra crepa.",
        "Vorrei una bottiglia d'acqua e un bicchiere di vino.",
    ),
}
_WORDS = """
apple banana people mother father open above below summer winter family paper butter happy
maybe number remember moment movie music water window yellow beautiful wonderful problem
company computer picture camera animal elephant umbrella balloon mountain valley river ocean
morning evening before after between about again always never sometimes follow hello goodbye
thank welcome friend neighbour village city garden flower bird fish horse monkey tomato potato
coffee tea milk bread cheese pepper sugar salt knife fork spoon table chair house mouse moon
sun star cloud rain snow storm thunder fire earth air wood stone iron gold silver blue green
red orange purple white black brown pink five seven eight nine eleven fifty million first
second third early late quick slow big small wide narrow long short far near high low why how
where when who what which whose this that these those bubble pebble mumble jump bump map mop
bomb pump five heavy very over ever value voice fox fuzzy wow we away one once whale
"""


def random_text(generator: np.random.Generator, language: str) -> str:
    """A sentence of the list, or in English half of the time six to twelve words in any order."""
    if language == "en" and generator.random() < 0.6:
        count = int(generator.integers(6, 13))
        words = [str(word) for word in generator.choice(_WORDS.split(), count)]
        if generator.random() < 0.5:
            words[count // 2] += ","
        return " ".join(words).capitalize() + "."
    sentences = SENTENCES[language]
    return sentences[int(generator.integers(len(sentences)))]
