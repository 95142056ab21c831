"""The metrics of LongBench (Bai et al. 2023, arXiv 2308.14508), with the behaviour of its published scorer, odd parts
included. Each takes (prediction, answer) and returns 0 to 1; `classification` also the names of all classes."""

import difflib
import re
import string
from collections import Counter

from minillm.errors import UsageError

FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # sets whose predictions are cut to their first line
CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_REMOVED = str.maketrans("", "", string.punctuation)
_REMOVED_ZH = str.maketrans("", "", string.punctuation + CHINESE_MARKS)


def score_row(dataset, metric, prediction, answers, all_classes):
    """The score of a row: the best over its answers."""
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if metric == "classification":
        return max((classification(prediction, answer, all_classes) for answer in answers), default=0.0)
    return max((METRICS[metric](prediction, answer) for answer in answers), default=0.0)


def f1(prediction, answer):
    """Of two lists of words, counted as often as they occur."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction, answer):
    """Of the words in lower case, without punctuation and articles."""

    def split(text):
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_REMOVED)).split()

    return f1(split(prediction), split(answer))


def qa_f1_zh(prediction, answer):
    def split(text):
        words = ("".join(word.lower().translate(_REMOVED_ZH).split()) for word in segment(text))
        return [word for word in words if word]

    return f1(split(prediction), split(answer))


def segment(text):
    """Chinese text as words."""
    try:
        import jieba
    except ModuleNotFoundError:
        raise UsageError("the Chinese sets of LongBench need jieba: pip install jieba (or leave them out)") from None
    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text, cut_all=False))


def rouge(prediction, answer):
    """ROUGE-L f as PyPI rouge 1.0.1 has it: on the summary level, sentences end at every full stop, words are sets,
    and of each longest common subsequence only the set of its words counts. 0 where either text has no sentence.

    (That package recurses as deep as two sentences are long: a scorer built on it gives 0 beyond Python's limit of
    about 1,000 words, and this one does not.)"""
    said, wanted = ([" ".join(part.split()).split(" ") for part in x.split(".") if part] for x in (prediction, answer))
    if not said or not wanted:
        return 0.0
    common = set()
    for reference in wanted:
        for sentence in said:
            common |= common_subsequence(reference, sentence)
    precision = len(common) / len({word for sentence in said for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    return 2.0 * precision * recall / (precision + recall + 1e-8)


def common_subsequence(a, b):
    """The set of words of a longest common subsequence of two lists; of several, the one that `rouge` walks to."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        above, row = table[i - 1], table[i]
        for j, y in enumerate(b, 1):
            row[j] = above[j - 1] + 1 if x == y else max(above[j], row[j - 1])
    found, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.add(a[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_zh(prediction, answer):
    return rouge(" ".join(segment(prediction)), " ".join(segment(answer)))


def classification(prediction, answer, all_classes):
    """1 / the number of classes named, if the right one is. Names inside the right name are dropped, from the list that
    is being walked: the one after a dropped name is not looked at."""
    named = [name for name in all_classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction, answer):
    """The share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction, answer):
    return count(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction, answer):
    return count(prediction, re.findall(r"段落(\d+)", answer)[0])


def code_similarity(prediction, answer):
    """difflib's ratio, in whole percent, of the first line without a backtick, # or //."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


METRICS = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_similarity": code_similarity,
}
