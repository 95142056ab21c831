"""Writes the generated texts that come with minillm: sentences full of numbers, logs, tables, records.

    python tools/make_texts.py        into minillm/profile/texts and minillm/evaluate/data

Those of the profiles and those of the evaluation have different words and different sentences, so that nothing is
measured on what a profile was made from; and no sentence is that of a needle (minillm.evaluate.needles, .ruler)."""

import random
import re
import uuid
from datetime import datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).parent.parent / "minillm"
PROFILE, HELD_OUT = ROOT / "profile/texts", ROOT / "evaluate" / "data"
SIZE, HELD_OUT_SIZE = 9_000, 40_000  # characters of a text; numbers take a token for each digit or two
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

FIELDS = {  # what {name ...} in a template stands for
    "int": lambda rng, low, high: str(rng.randrange(int(low), int(high))),
    "float": lambda rng, low, high, digits: f"{rng.uniform(float(low), float(high)):.{digits}f}",
    "digits": lambda rng, n: str(rng.randrange(10 ** (int(n) - 1), 10 ** int(n))),
    "code": lambda rng, n, m: "".join(rng.choices(LETTERS, k=int(n))) + "-" + FIELDS["digits"](rng, m),
    "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "hex": lambda rng, n: f"{rng.getrandbits(4 * int(n)):0{n}x}",
    "date": lambda rng, *style: day(rng).strftime(" ".join(style)),
    "of": lambda rng, *words: rng.choice(" ".join(words).split("/")),
    "repeat": lambda rng, text, low, high: text * rng.randrange(int(low), int(high)),
}


def day(rng):
    return datetime(1988, 1, 1) + timedelta(days=rng.randrange(13_000), seconds=rng.randrange(86_400))


def draw(template, rng, words=None):
    """The template with each of its fields drawn anew: a field of FIELDS, or a list of words."""

    def field(match):
        name, *arguments = match[1].split()
        if name in FIELDS:
            return FIELDS[name](rng, *arguments)
        return draw(rng.choice(words[name]), rng, words)

    return re.sub(r"\{([a-z][^{}]*)\}", field, template)


def fill(make, size, opening=()):
    """Lines of make() until there are `size` characters, none of them twice."""
    lines, seen, total = list(opening), set(), 0
    while total < size:
        line = make()
        if line not in seen:
            seen.add(line)
            lines.append(line)
            total += len(line)
    return lines


# For profiles

WORDS = {
    "first": (
        "Ada Bruno Celia Dmitri Elena Farid Greta Hugo Ines Jonas Katya Leon Mirela Nadia Omar Petra Quentin Rosa "
        "Stefan Tilda Ursula Viktor Wanda Xavier Yusuf Zora"
    ).split(),
    "last": (
        "Abbott Baranov Castellano Dupont Eriksen Fontaine Galvez Hartmann Ivanova Jansen Kowalski Lindqvist Moreau "
        "Nakamura Okafor Pellegrini Quiroga Rossi Sandoval Takahashi Ulrich Vasquez Whitfield Yilmaz Zielinski"
    ).split(),
    "town": (
        "Aberdeen Bilbao Cardiff Delft Evora Freiburg Gdansk Heraklion Izmir Jena Kaunas Leiden Malaga Nantes Odense"
    ).split(),
    "goods": (
        "copper wire,oak boards,linen shirts,coffee beans,glass jars,ball bearings,writing paper,roof tiles,"
        "garden hoses,"
        "wool blankets,paint brushes,steel bolts,olive oil,candles,light bulbs,door hinges,canvas bags,tea cups"
    ).split(","),
    "place": (
        "the harbour,the north store,the old mill,the second floor,the archive,the workshop,the east gate,"
        "the loading bay"
    ).split(","),
    "person": ["{first} {last}"],
    "phone": ["{digits 3}-{digits 3}-{digits 4}"],
    "price": ["{float 1 999 2}"],
    "item": ['{"sku": "{code 3 5}", "name": "{goods}", "count": {int 1 50}, "price": {price}}'],
    "items": ["{item}", "{item}, {item}", "{item}, {item}, {item}"],
}
FACTS = """\
{person} can be reached at {phone} until {date %H:%M}.
Call {person} on extension {digits 4} if {goods} run short.
The parcel for {person} carries the tracking code {code 3 8} and waits at {place}.
Order {digits 6} was {int 2 900} boxes of {goods}, sent to {town} on {date %d %B %Y}.
{person} was born in {town} on {date %B %d, %Y}, and {person} was the only witness.
My locker is number {int 2 900}, and its combination is {digits 2}-{digits 2}-{digits 2}.
In {town} a crate of {goods} costs {price} crowns; last year it was {price}.
Please write this down: {code 2 4} opens {place}, {code 2 4} closes it.
Flight {code 2 3} to {town} leaves from gate {of A/B/C/D}{int 1 60} at {date %H:%M}.
Invoice {digits 7} from {person} amounts to {price} and is due on {date %Y-%m-%d}.
{person} ({digits 2}) finished in {int 2 900} minutes, {person} in {int 2 900}.
The serial number on the back reads {code 4 6}; {first} noted {code 4 6} for the spare one.
{person} keeps the {goods} in {place}, shelf {int 1 40}, bin {of Q/R/S/T}.
Passport {code 1 8} belongs to {person}, who lives at {int 1 300} {last} Street, {town}.
The request {uuid} was answered by {person} after {int 2 900} seconds.
Between {town} and {town} lie {int 20 2000} kilometres, and the train takes {int 2 9} hours.
For {place} the password is {last}{town}{int 2 900}, says {person}.
{person} owes {person} exactly {price} for {int 2 90} {goods}.""".split("\n")
LOG = """\
INFO  [worker-{int 0 16}] request {uuid} finished in {int 3 4000} ms, status 200
WARN  [pool-{int 0 4}] queue has {int 100 999} jobs, limit {int 1000 2000}
ERROR [db] connection to {int 1 255}.{int 0 255}.{int 0 255}.{int 1 255}:{int 1024 65535} lost after {int 1 90} tries
INFO  [auth] user {last}{int 0 99} logged in from {int 1 255}.{int 0 255}.{int 0 255}.{int 1 255}
DEBUG [cache] evicted {int 0 9000} entries, {int 0 999999999} bytes free
INFO  [mail] message <{digits 9}@{town}.example> to {last} queued as {code 3 5}""".split("\n")
RECORD = (
    '{"id": "{uuid}", "customer": {"name": "{person}", "town": "{town}", "phone": "{phone}"}, "items": [{items}], '
    '"paid": {of true/false}, "at": "{date %Y-%m-%dT%H:%M:%S}"}'
)
ORDER = "{digits 6},{person},{town},{date %Y-%m-%d},{goods},{int 1 400},{price}"
WEATHER = (
    "| {town} | {date %d %b %Y} | {float -15 9 1} | {float 9 34 1} | {int 980 1040} | {of rain/clear/fog/snow/wind} "
    "| {int 0 100} % |"
)
SETTING = "[{of server/client/store/mail/backup/log}.{town}-{int 0 99}]"
SETTINGS = """\
host = {last}.{town}.example
port = {int 1024 65535}
token = {hex 24}
timeout_ms = {int 50 9000}
owner = "{person}"
retries = {int 0 12}
path = /srv/{town}/{last}/{digits 3}""".split("\n")
CALL = [  # a service desk, where one side spells out numbers; a line of each
    ["Agent: Good morning, how can I help?", "Agent: Service desk, what can I do for you?"],
    ["Caller: This is {person}. My order {digits 7} has not come.", "Caller: {person} here. The number is {digits 7}."],
    ["Agent: Thank you. That was {int 3 60} {goods} for {town}, right?", "Agent: Is that {digits 7} or {digits 7}?"],
    ["Caller: Yes, on {date %B %d}.", "Caller: No, {int 3 60}, I am quite sure.", "Caller: The first one, {digits 7}."],
    ["Agent: It left {place} yesterday. Your new code is {code 2 5}.", "Agent: Then I give you {price} back."],
    [
        "Caller: I have written it down.",
        "Caller: And if it fails?\nAgent: Then call {phone} and ask for {person}.",
        "-",
    ],
]


def log_line(rng, clock):
    clock["now"] += timedelta(seconds=rng.randrange(40), milliseconds=rng.randrange(1000))
    return f"{clock['now']:%Y-%m-%d %H:%M:%S} {draw(rng.choice(LOG), rng, WORDS)}"


def timetable(rng):
    start, lines = day(rng), [draw("Train {code 2 3}", rng)]
    for town in rng.sample(WORDS["town"], rng.randrange(4, 8)):
        lines.append(f"  {start:%H:%M}  {town:<12} platform {rng.randrange(1, 15)}")
        start += timedelta(minutes=rng.randrange(9, 70))
    return "\n".join(lines)


def settings(rng):
    lines = [SETTING, *rng.sample(SETTINGS, rng.randrange(3, 7)), ""]
    return draw("\n".join(lines), rng, WORDS)


def call(rng):
    return draw("\n".join([*map(rng.choice, CALL), ""]), rng, WORDS)


def between_sentences(rng, prose, templates, every):
    """Prose with one of the templates after every so many of its sentences."""
    pieces = []
    for sentence in re.split(r"(?<=[a-z]{3}[.!?]) ", prose):
        pieces.append(sentence)
        if rng.random() < 1 / every:
            pieces.append(draw(rng.choice(templates), rng, WORDS))
    return " ".join(pieces)


def profile_texts():
    """{name: text}"""
    clock = {"now": datetime(2021, 5, 3, 6, 0)}
    weather = ["# Weather\n", "| station | day | low | high | hPa | sky | humidity |", "|---|---|---|---|---|---|---|"]
    makers = {
        "facts-1": (lambda rng: draw(rng.choice(FACTS), rng, WORDS), []),
        "facts-2": (lambda rng: draw(rng.choice(FACTS), rng, WORDS), []),
        "facts-3": (lambda rng: draw(rng.choice(FACTS), rng, WORDS), []),
        "server-log": (lambda rng: log_line(rng, clock), []),
        "records": (lambda rng: draw(RECORD, rng, WORDS), []),
        "orders": (lambda rng: draw(ORDER, rng, WORDS), ["number,customer,town,date,goods,count,price"]),
        "weather": (lambda rng: draw(WEATHER, rng, WORDS), weather),
        "settings": (settings, []),
        "timetables": (timetable, ["Departures\n"]),
        "calls": (call, []),
    }
    texts = {}
    for name, (make, opening) in makers.items():
        rng = random.Random(name)
        lines = fill(lambda: make(rng), SIZE, opening)  # noqa: B023
        texts[name] = (" " if name.startswith("facts") else "\n").join(lines) + "\n"
    for name, templates, every in (
        ("novel-northanger", FACTS, 4),
        ("speech-1876", FACTS, 8),
        ("law-declaration", [RECORD], 6),
    ):
        prose = (PROFILE / f"{name}.txt").read_text(encoding="utf-8")
        texts[f"facts-in-{name}"] = between_sentences(random.Random(name), prose, templates, every)
    return texts


# Held out

HELD_OUT_WORDS = {
    "who": "Aksel Birgit Cyrus Dagny Emre Fenna Goran Hanne Idris Jolanta Kasper Livia Matteo Noor Oskar".split(),
    "river": "Amstel Bidasoa Clyde Drava Ebro Fulda Gave Havel Isar Jarama Kolva Loire Meuse Neva Orava Pregel".split(),
    "find": "bronze ring,clay lamp,bone comb,iron key,glass bead,silver spoon,stone axe,lead seal,amber pin".split(","),
    "star": "Altair Bellatrix Capella Deneb Electra Fomalhaut Gacrux Hamal Izar Kochab Mizar Naos".split(),
    "tool": "pliers,spirit level,hand drill,mallet,try square,rasp,bench vice,oil stone,pencil,gouge,clamp".split(","),
    "wood": "ash,beech,cherry,elm,larch,maple,oak,pear,pine,walnut,yew,lime".split(","),
    "job": "plane,saw,glue,oil,measure,mark,sand,drill,turn,carve,clean,sharpen".split(","),
}
NUMBERS = """\
Trench {int 1 60}, depth {float 0.2 4 2} m: {find}, weight {float 1 90 1} g, bag {digits 5}.
{who} read the gauge of the {river} as {int 2 500} cm at {date %H:%M}, {int 1 40} cm more than before.
{star} stood {float 5 85 2} degrees high; plate {digits 4} was exposed for {int 20 900} s.
Drawing {digits 3}/{int 1 30} by {who} shows the {find} of {date %d.%m.%Y}.
Sample {code 1 5}: {float 0 14 1} pH, {int 100 4000} uS/cm, taken from the {river} by {who}.
Radio check on {float 40 440 3} MHz, {who} answers as {code 2 3}, signal {int 1 10}.
Boat {int 1 20} crossed the {river} in {int 2 60} min {int 0 60} s with {int 2 500} kg aboard.
Grid square {of J/K/L/M}{int 10 99} yielded {int 2 500} sherds and {int 1 9} pieces of {of slag/flint/bone}.
Benchmark {digits 4} lies at {float 100 900 3} m, {float 0.001 0.09 3} m lower than in {int 1950 2010}.
Shelf mark {of Q/R/S/T} {int 100 999}.{int 10 99} holds the letters of {who} from {int 1700 1900}.
Camera {int 1 12} took frames {int 2 40} to {int 40 99} of the {find}, film {code 1 4}.
{who} drew {int 2 500} litres, {int 2 9} cans of fuel and rope no. {digits 4} from the store tent.""".split("\n")
LISTS = [  # a heading, and a line that comes several times; # is its number
    ("To do in week {int 1 53}:", "- [{of  /x}] {job} the {wood} {of boards/legs/top/rails/frame}"),
    (
        "Parts of bench {digits 3}\n| part | wood | length | width | pieces |\n|---|---|---|---|---|",
        "| {of leg/rail/slat/top/wedge} | {wood} | {int 100 2000} | {int 20 200} | {int 1 12} |",
    ),
    ("Drawer {int 1 90} holds", "#. {tool}, {of new/old/borrowed/broken/without handle}"),
    ("Results of the race on the {river}, {int 1890 1990}", "#) {who} {int 9 12}:{int 10 60}.{int 0 10}"),
    ("Members of {int 1900 1999}:", "* {who} ({wood}, {river}), since {int 1880 1990}"),
    ("Chapter {int 1 40}", "  #.{int 1 9} How to {job} {wood} with a {tool} {repeat . 4 20} {int 5 400}"),
]


def listed(rng):
    heading, line = rng.choice(LISTS)
    lines = [heading, *(line.replace("#", str(i)) for i in range(1, rng.randrange(4, 8)))]
    return draw("\n".join(lines), rng, HELD_OUT_WORDS)


def held_out_texts():
    """{name: text}"""
    rng = random.Random("held out")
    numbers = fill(lambda: draw(rng.choice(NUMBERS), rng, HELD_OUT_WORDS), HELD_OUT_SIZE)
    lists = fill(lambda: listed(rng), HELD_OUT_SIZE)
    return {"numbers": "\n".join(numbers) + "\n", "lists": "\n".join(lists) + "\n"}


if __name__ == "__main__":
    for folder, texts in ((PROFILE, profile_texts()), (HELD_OUT, held_out_texts())):
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
