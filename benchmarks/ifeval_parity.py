"""Our IFEval checkers against lm-evaluation-harness's, verdict by verdict on made responses.

Usage: python benchmarks/ifeval_parity.py DIR [--quick] [--out FILE]. DIR holds IFEval's
input_data.jsonl. For every prompt some twenty responses are made: empty, the prompt itself, texts
built to follow or to break each instruction, random text, other languages, Markdown around them.
Prints the agreement per checker and writes benchmarks/results/<date>-<hardware>-ifeval-parity.json.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import (
    HERE,
    circumstances,
    contender_environment,
    frozen,
    peer_python,
    say,
    table,
    write_result,
)

from postgrad.evaluate.tasks.ifeval import CRITERIA, english_punkt, language_detector
from postgrad.evaluate.tasks.instructions import ANSWERS, CHECKERS, instruction, needs
from postgrad.evaluate.tasks.segmentation import PUNKT_ENGLISH
from postgrad.sources import resolve

REQUIREMENTS = HERE / "peers" / "lmeval-requirements.txt"
QUICK = 40
SEED = 7
SHOWN = 10

LANGUAGES = {
    "en": "The weather was fine in the morning, and everybody went out to work in the garden.",
    "de": "Das Wetter war am Morgen schön, und alle gingen hinaus, um im Garten zu arbeiten.",
    "it": "Il tempo era bello al mattino e tutti uscirono a lavorare nel giardino.",
    "pt": "O tempo estava bom de manhã e todos saíram para trabalhar no jardim.",
    "fi": "Sää oli aamulla kaunis, ja kaikki lähtivät ulos työskentelemään puutarhassa.",
    "vi": "Buổi sáng trời đẹp và mọi người ra ngoài làm việc trong vườn.",
    "sw": "Hali ya hewa ilikuwa nzuri asubuhi na kila mtu alitoka kwenda kufanya kazi bustanini.",
    "ru": "Утром была хорошая погода, и все вышли работать в сад.",
    "bg": "Времето сутринта беше хубаво и всички излязоха да работят в градината.",
    "ar": "كان الطقس جميلا في الصباح وخرج الجميع للعمل في الحديقة.",
    "fa": "هوا صبح خوب بود و همه برای کار در باغ بیرون رفتند.",
    "ur": "صبح موسم اچھا تھا اور سب لوگ باغ میں کام کرنے کے لیے باہر گئے",
    "hi": "सुबह मौसम अच्छा था और सब लोग बगीचे में काम करने के लिए बाहर गए।",
    "ko": "아침에 날씨가 좋아서 모두 정원에서 일하러 나갔습니다.",
    "th": "ตอนเช้าอากาศดีและทุกคนออกไปทำงานในสวน",
    "ta": "காலையில் வானிலை நன்றாக இருந்தது, அனைவரும் தோட்டத்தில் வேலை செய்யச் சென்றனர்.",
}
FRAGMENTS = (
    *("Dr. Smith of the U.S. said so. ", "It cost $3.50! ", "Why?! ", "e.g. this. ", "Hm... no. "),
    *('He said: "Go." ', "(Yes.) ", "I DON'T KNOW. ", "NASA AND ESA, ", "P.S. later ", "P. P. S. "),
    *("[name] ", "[ ] ", "<<Title>> ", "<< >> ", "* item\n", "- item\n", "** bold\n", "*a* "),
    *("**b** ", "***", "\n***\n", "******", "\n\n", "\n", "SECTION 1 ", "Section 2\n", "Day 3 "),
    *(
        '{"a": 1}',
        "```",
        "\u201cQuoted.\u201d ",
        "it\u2019s ",
        "caf\u00e9 ",
        "a, b; c: d. ",
        "I'm ",
    ),
    *("CANNOT ", "1. one\n", "My answer is no. ", "Mr. J. Bach came at 5 p.m. Then he left. "),
    *("No. 7 is Jan. 3. ", "\u2013", "the end", "Is there anything else I can help with?", '"'),
    *("'", ",", "qjz ", "Inc. of N.Y. grew. But ", "vs. ", "THE END.", "Ph.D. "),
)


def follow(name: str, arguments: Mapping[str, Any], text: str, prompt: str) -> str:
    """Return the text changed so that it (mostly) follows an instruction."""
    get = arguments.get
    match name.partition(":")[2]:
        case "existence":
            return f"{text} {' '.join(get('keywords', ()))}"
        case "frequency":
            return f"{text} {' '.join([arguments['keyword']] * arguments['frequency'])}"
        case "letter_frequency":
            return text + arguments["letter"] * arguments["let_frequency"]
        case "response_language":
            return LANGUAGES.get(arguments["language"], LANGUAGES["en"])
        case "number_sentences":
            return " ".join(["Dr. Jones waits."] * arguments["num_sentences"])
        case "number_words":
            return " ".join(["well-known word"] * arguments["num_words"])
        case "number_paragraphs":
            return "\n***\n".join([text.replace("*", "")] * arguments["num_paragraphs"])
        case "nth_paragraph_first_word":
            parts = [text.replace("\n", " ")] * arguments["num_paragraphs"]
            parts[arguments["nth_paragraph"] - 1] = f"'{arguments['first_word'].title()}, so."
            return "\n\n".join(parts)
        case "number_placeholders":
            return text + " [thing]" * arguments["num_placeholders"]
        case "postscript":
            return f"{text}\n{arguments['postscript_marker']} One more thing."
        case "number_bullet_lists":
            return "\n".join(["* a point"] * arguments["num_bullets"])
        case "constrained_response":
            return ANSWERS[len(text) % 3]
        case "number_highlighted_sections":
            return text + " *part*" * arguments["num_highlights"]
        case "multiple_sections":
            heading = arguments["section_spliter"]
            numbers = range(1, arguments["num_sections"] + 1)
            return "\n".join(f"{heading} {number}\n{text}" for number in numbers)
        case "json_format":
            return f"```json\n{json.dumps({'answer': text})}\n```"
        case "title":
            return f"<<A title>>\n{text}"
        case "two_responses":
            return f"{text}\n******\nAnother {text}"
        case "repeat_prompt":
            return f"{arguments['prompt_to_repeat']}\n{text}"
        case "end_checker":
            return f"{text} {arguments['end_phrase']}"
        case "capital_word_frequency":
            return text.lower() + " LOUD" * arguments["capital_frequency"]
        case "english_capital":
            return LANGUAGES["en"].upper()
        case "english_lowercase":
            return LANGUAGES["en"].lower()
        case "no_comma":
            return text.replace(",", "")
        case "quotation":
            return f'"{text}"'
        case "forbidden_words":
            banned = arguments["forbidden_words"]
            return re.sub("|".join(map(re.escape, banned)), "", text, flags=re.IGNORECASE)
    raise AssertionError(name)


def breaking(name: str, arguments: Mapping[str, Any], text: str, prompt: str) -> str:
    """Return a text that misses an instruction, where it can by one."""
    fewer = {
        key: value - 1 if isinstance(value, int) and value > 1 else value
        for key, value in arguments.items()
    }
    match name.partition(":")[2]:
        case "forbidden_words":
            return f"{text} {arguments['forbidden_words'][0].upper()}."
        case "no_comma":
            return f"{text}, indeed"
        case "quotation" | "json_format" | "end_checker":
            return follow(name, arguments, text, prompt)[:-1] + "…"
        case "existence":
            return follow(name, {"keywords": arguments["keywords"][1:]}, text, prompt)
        case "response_language":
            return LANGUAGES["de" if arguments["language"] != "de" else "en"]
        case "english_capital" | "english_lowercase":
            return LANGUAGES["en"]
    return follow(name, fewer, text, prompt)[1:]


def responses(row: Mapping[str, Any], others: Sequence[str], rng: random.Random) -> dict[str, str]:
    """Return kind -> response for one prompt."""
    prompt = row["prompt"]
    text = " ".join(rng.sample(others, 2))
    made = {
        "empty": "",
        "blank": " \n ",
        "prompt": prompt,
        "upper": prompt.upper(),
        "lower": prompt.lower(),
        "other text": text,
        "random": "".join(rng.choices(FRAGMENTS, k=rng.randint(3, 40))),
        "random lines": "\n".join(rng.choices(FRAGMENTS, k=rng.randint(3, 20))),
        "language": rng.choice(list(LANGUAGES.values())),
    }
    whole = text
    pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    for number, (name, arguments) in enumerate(pairs):
        made[f"follows {number}"] = follow(name, arguments, text, prompt)
        made[f"breaks {number}"] = breaking(name, arguments, text, prompt)
        whole = follow(name, arguments, whole, prompt)
    made["follows all"] = whole
    made["introduced"] = f"Sure, here it is:\n\n{whole}\n\nI hope this helps, friend."
    made["bold"] = f"**{whole}**"
    made["fenced"] = f"```\n{whole}\n```"
    made["listed"] = "\n".join(f"- {line}" for line in whole.split("\n"))
    made["headed"] = "# Answer\n\n" + whole.replace(". ", ".\n\n")
    return made


def our_verdicts(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, list[list[bool]]]]:
    """Return kind -> [strict, loose] of every prompt, as our checkers see it."""
    tools = {"punkt": english_punkt(), "detect": language_detector()}
    found = []
    for case in cases:
        pairs = zip(case["instruction_id_list"], case["kwargs"], strict=True)
        wanted = [instruction(name, arguments) for name, arguments in pairs]
        found.append(
            {
                kind: [[f(text, one, **tools) for one in wanted] for f in CRITERIA.values()]
                for kind, text in case["responses"].items()
            }
        )
    return found


def peer_verdicts(cases: Sequence[Mapping[str, Any]], python: Path) -> list[dict[str, Any]]:
    """Return the same from the peer, in its own process."""
    with tempfile.TemporaryDirectory(prefix="postgrad-ifeval-") as name:
        folder = Path(name)
        source, target = folder / "cases.jsonl", folder / "verdicts.jsonl"
        lines = (json.dumps(case, ensure_ascii=False) + "\n" for case in cases)
        source.write_text("".join(lines), encoding="utf-8")
        data = folder / "nltk_data"
        punkt = data / "tokenizers" / "punkt_tab" / "english"
        shutil.copytree(resolve(PUNKT_ENGLISH, "data"), punkt)
        command = [python, HERE / "peers" / "ifeval_verdicts.py", source, target]
        environment = contender_environment() | {"NLTK_DATA": str(data)}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def drawn_by_peer(name: str, arguments: Mapping[str, Any]) -> bool:
    """Tell whether the peer asks for another letter than the prompt: it draws one for a sign."""
    return name == "keywords:letter_frequency" and not arguments["letter"].isalpha()


def count(
    cases: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Return the counts per checker and every case where the verdicts differ."""
    kinds = ("verdicts", "followed", *(f"{name} agree" for name in CRITERIA), "drawn")
    counts = {name: dict.fromkeys(kinds, 0) for name in CHECKERS}
    differing = []
    for case, mine, peer in zip(cases, ours, theirs, strict=True):
        instructions = list(zip(case["instruction_id_list"], case["kwargs"], strict=True))
        for kind, verdicts in mine.items():
            for number, (name, arguments) in enumerate(instructions):
                if drawn_by_peer(name, arguments):
                    counts[name]["drawn"] += 1
                    continue
                counts[name]["verdicts"] += 1
                counts[name]["followed"] += peer["verdicts"][kind][0][number]
                for place, criterion in enumerate(CRITERIA):
                    a, b = verdicts[place][number], peer["verdicts"][kind][place][number]
                    counts[name][f"{criterion} agree"] += a == b
                    if a != b:
                        facts = {"key": case["key"], "kind": kind, "checker": name}
                        differing.append({**facts, "criterion": criterion, "ours": a, "peer": b})
    return counts, differing


def main() -> int:
    """Compare, print the table, write the result; return 1 when a verdict differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK} prompts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = (options.folder / "input_data.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][: QUICK if options.quick else None]
    rng = random.Random(SEED)
    prompts = [row["prompt"] for row in rows]
    cases = [{**row, "responses": responses(row, prompts, rng)} for row in rows]
    python = peer_python(REQUIREMENTS)
    say(f"{sum(len(case['responses']) for case in cases):,} responses, ours")
    ours = our_verdicts(cases)
    say("the peer")
    theirs = peer_verdicts(cases, python)
    counts, differing = count(cases, ours, theirs)
    heading = ["checker", "", "verdicts", "followed", "strict agree", "loose agree", "drawn"]
    total = {key: sum(found[key] for found in counts.values()) for key in heading[2:]}
    body = [[name, "", *(f"{v:,}" for v in found.values())] for name, found in counts.items()]
    print(table([heading, *body, ["all", "", *(f"{v:,}" for v in total.values())]]))
    print("drawn: verdicts left out because the peer draws a letter where the prompt has a sign")
    for case in differing[:SHOWN]:
        print(case)
    language = sum(counts[name]["verdicts"] for name in CHECKERS if needs(name, "detect"))
    chance = sum(row["unsteady"] for row in theirs)
    print(f"language verdicts of the peer that change with langdetect's seed: {chance}/{language}")
    document = {
        **circumstances(),
        "peer": frozen(python),
        "prompts": len(cases),
        "responses": sum(len(case["responses"]) for case in cases),
        "checkers": counts,
        "differing": differing,
        "language_verdicts": {"n": language, "changed_by_seed": chance},
    }
    print(write_result(document, "ifeval-parity", options.out))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
