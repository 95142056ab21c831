"""Made-up rows in the format of LongBench's data.zip: all 21 sets, with the fields, languages, classes, examples and
empty questions that theirs have, and texts of our own.

    python tests/longbench_rows.py data.zip
"""

import hashlib
import json
import sys
import zipfile

FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
CLASSES = ["Food", "Date", "Number of something", "Order, rank", "Other number", "Number", "City", "Other location"]
CLASSES_ZH = ["农业、农村", "军事", "文学、艺术", "体育", "传媒业", "医药、卫生", "交通运输、邮政、物流"]
STORY = "The mill at Ardel stood by the river. Its keeper, Ann Moore, was born in 1874. She sold flour to the town. "
STORY_ZH = "阿德尔的磨坊在河边。看守人安妮生于一八七四年。她把面粉卖给镇上的人。"
CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"
HALL = "Professor A: We keep the mill open until May.\nStudent B: And the grant?\nProfessor A: It pays for the roof.\n"


def row(name, i, language, context, question, answers, classes=None):
    length = len(context) if language == "zh" else len(context.split())
    digest = hashlib.sha256(f"{name}{i}".encode()).hexdigest()[:48]
    return dict(zip(FIELDS, (question, context, answers, length, name, language, classes, digest), strict=True))


def rows(name, n, repeats):
    """n rows of a set, whose context is a text repeated so often."""
    return [row(name, i, *_parts(name, i, repeats)) for i in range(n)]


def _parts(name, i, repeats):
    """-> language, context, input, answers, and all classes where there are any."""
    story, story_zh = STORY * repeats, STORY_ZH * repeats
    asked, asked_zh = "Who kept the mill?", "谁看守磨坊？"
    return {
        "narrativeqa": ("en", story, asked, ["Ann Moore", "Ann"]),
        "qasper": ("en", story, asked, ["Ann Moore", "unanswerable"]),
        "multifieldqa_en": ("en", story, asked, ["Ann Moore"]),
        "multifieldqa_zh": ("zh", story_zh, asked_zh, ["安妮。"]),
        "hotpotqa": ("en", f"Passage 1:\nMill\n{story}\nPassage 2:\nTown\n{story}", asked, ["Ann Moore"]),
        "2wikimqa": ("en", f"Passage 1:\nMill\n{story}", "When was the keeper born?", ["1874"]),
        "musique": ("en", f"Passage 1:\nMill\n{story}", asked, ["Ann Moore"]),
        "dureader": ("zh", f"文章1\n标题：磨坊\n{story_zh}", "磨坊在哪", ["河边", "磨坊在阿德尔的河边。"]),
        "gov_report": ("en", story, "", ["The mill sold flour. Its keeper was Ann Moore."]),
        "qmsum": ("en", HALL * repeats, "What was said of the grant?", ["The grant pays for the roof."]),
        "multi_news": ("en", f"Passage 1:\n{story}\nPassage 2:\n{story}", "", ["The mill at Ardel sold flour."]),
        "vcsum": ("zh", story_zh, "", ["会议讨论了磨坊和面粉。"]),
        "trec": (
            "en",
            "Question: When was the mill built ?\nType: Date\n" * repeats,
            "Question: How many people live in Ardel ?\nType:",
            ["Number of something"],
            CLASSES,
        ),
        "triviaqa": (
            "en",
            f"Passage:\n{STORY}\nQuestion:\nWhere is the mill?\nAnswer:\nArdel\n\n" * repeats,
            f"Passage:\n{STORY}\nQuestion:\nWho kept the mill?\nAnswer:\n",
            ["Ann Moore", "Moore", "ANN MOORE"],
        ),
        "samsum": (
            "en",
            "Dialogue: Ann: Is the flour there?\nBen: Tomorrow.\nSummary: Ben brings flour tomorrow.\n" * repeats,
            "Dialogue: Ben: The roof leaks.\nAnn: I will mend it.\nSummary: ",
            ["Ann will mend the roof."],
        ),
        "lsht": (
            "zh",
            "新闻内容：\n面粉\n类别：农业、农村\n" * repeats,
            "新闻内容：\n球赛\n类别：",
            ["体育"],
            CLASSES_ZH,
        ),
        "passage_count": ("en", "".join(f"Paragraph {j}: {STORY}\n\n" for j in range(1, repeats + 1)), "", ["1"]),
        "passage_retrieval_en": (
            "en",
            "".join(f"Paragraph {j}: {STORY}\n\n" for j in range(1, repeats + 1)),
            "A mill sells flour.",
            [f"Paragraph {i + 1}"],
        ),
        "passage_retrieval_zh": (
            "zh",
            "".join(f"段落{j}：{STORY_ZH}\n" for j in range(1, repeats + 1)),
            "磨坊卖面粉。",
            [f"段落{i + 1}"],
        ),
        "lcc": ("python", CODE * repeats, "", ["    return area(width, height) * depth"]),
        "repobench-p": ("python", f"# geometry.py\n{CODE}" * repeats, CODE, ["    return area(width, height) * depth"]),
    }[name]


def write_zip(path, sets, n=2, repeats=3):
    with zipfile.ZipFile(path, "w") as archive:
        for name in sets:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in rows(name, n, repeats))
            archive.writestr(f"data/{name}.jsonl", "".join(lines))


if __name__ == "__main__":
    from minillm.evaluate.longbench import SETS

    write_zip(sys.argv[1], SETS)
