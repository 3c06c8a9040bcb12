"""Which language a text is in (data/languages.py): whole passages, mixed ones with a known share,
code and mathematics, and what tries to slip through.

python -m pytest tests/test_languages.py
"""

import random
import re
import time

import pytest

from data.corpus import THEN, WORDS
from data.languages import HAN, LANGUAGES, LATIN, LISTED, RIVALS, language_of, language_share, words
from data.tokenizer import Tokenizer
from rewards import TAG

# Several registers each: mathematics, puzzles, a letter, news, a story, cooking, instructions.
PASSAGES = {
    "en": [
        "First we add seven and five, which gives 12. Then we multiply by three: the result is 36.",
        "Wait, that can't be right. Let me check the second step again before going on.",
        "Suppose Alice is a knight. Then Bob lies, which contradicts what Carol said about him.",
        "Dear Sir, thank you for your letter of last Tuesday; I enclose the papers you asked for.",
        "The council rejected plans to build a hotel beside the river after people had complained.",
        "Simmer the onions gently until golden, add garlic, then stir in the chopped tomatoes.",
        "She opened the door slowly. Nobody was there, only rain and the smell of wet leaves.",
        "By the triangle inequality, $|a + b| \\leq |a| + |b|$ holds, so the sequence converges.",
        "Rolling a die twice, the probability of at least one six is 11/36; a naïve guess is 1/3.",
        "To reset the device, hold down the power button for ten seconds and release it.",
        "The car leaves Boston at noon, driving at 60 miles per hour towards New York.",
        "Note: pour 3 liters into the larger jug, so 2 liters remain. Fill it once more. Done!",
    ],
    "zh": [
        "首先计算七加五，得到十二，再乘以三，所以结果是三十六。",
        "等等，这一步不对。让我重新检查一下第二步。",
        "假设甲是骑士，那么乙在说谎，这与丙的话矛盾。",
        "尊敬的先生：来信收到，随信附上您所需要的文件。",
        "居民投诉之后，市议会否决了在河边修建酒店的计划。",
        "洋葱用小火炒至金黄，加入蒜末，再放入切碎的西红柿翻炒均匀。",
        "她慢慢地打开门，外面没有人，只有雨声和湿树叶的气味。",
        "由三角不等式 $|a+b| \\leq |a|+|b|$ 可知，该数列收敛。",
        "掷两次骰子，至少出现一次六点的概率是 11/36。",
        "如需重置设备，请按住电源键十秒钟后松开。",
        "設直角三角形的兩條直角邊為 3 和 4，則斜邊為 5。",
    ],
    "de": [
        "Zuerst addieren wir sieben und fünf, das ergibt 12. Dann multiplizieren wir mit drei.",
        "Moment, das kann nicht stimmen. Ich prüfe den zweiten Schritt noch einmal.",
        "Angenommen, Anna ist ein Ritter. Dann lügt Bernd, was dem widerspricht, was Clara sagt.",
        "Sehr geehrter Herr Schmidt, vielen Dank für Ihr Schreiben vom letzten Dienstag.",
        "Der Stadtrat hat die Pläne für ein Hotel am Fluss nach Protesten der Anwohner abgelehnt.",
        "Die Zwiebeln bei kleiner Hitze glasig dünsten und mit dem Knoblauch kurz anbraten.",
        "Sie öffnete langsam die Tür. Niemand war da, nur der Regen und der Geruch nassen Laubs.",
        "Nach der Dreiecksungleichung gilt $|a + b| \\leq |a| + |b|$, also konvergiert die Folge.",
        "Beim zweimaligen Würfeln ist die Wahrscheinlichkeit für mindestens eine Sechs 11/36.",
        "Um das Gerät zurückzusetzen, halten Sie die Taste zehn Sekunden lang gedrückt.",
        "Der Zug fährt um zwölf Uhr in Hamburg ab und erreicht Berlin nach knapp zwei Stunden.",
    ],
    "fr": [
        "D'abord, nous additionnons sept et cinq, ce qui donne 12. Puis on multiplie par trois.",
        "Attendez, cela ne peut pas être juste. Je vérifie encore une fois la deuxième étape.",
        "Supposons qu'Alice soit un chevalier. Alors Bruno ment, et contredit ce que dit Chloé.",
        "Monsieur, je vous remercie de votre lettre de mardi dernier et vous envoie les documents.",
        "Le conseil municipal a rejeté le projet d'hôtel au bord du fleuve après des plaintes.",
        "Faites revenir les oignons à feu doux, puis ajoutez l'ail et les tomates coupées en dés.",
        "Elle ouvrit lentement la porte. Il n'y avait personne, rien que la pluie et les feuilles.",
        "Par l'inégalité triangulaire, on a $|a + b| \\leq |a| + |b|$, donc la suite converge.",
        "En lançant un dé deux fois, la probabilité d'obtenir au moins un six est de 11/36.",
        "Pour réinitialiser l'appareil, maintenez le bouton enfoncé pendant dix secondes.",
        "Le train part de Lyon à midi et arrive à Paris deux heures plus tard.",
    ],
    "es": [
        "Primero sumamos siete y cinco, lo que da 12. Luego multiplicamos por tres.",
        "Espera, esto no puede ser correcto. Voy a revisar otra vez el segundo paso.",
        "Supongamos que Ana es un caballero. Entonces Luis miente, lo que contradice a Marta.",
        "Estimado señor: le agradezco su carta del martes pasado y le envío los documentos.",
        "El ayuntamiento ha rechazado el plan de construir un hotel junto al río.",
        "Sofríe la cebolla a fuego lento hasta que esté dorada y añade el ajo y los tomates.",
        "Abrió la puerta despacio. No había nadie, solo la lluvia y el olor de las hojas mojadas.",
        "Por la desigualdad triangular se tiene $|a + b| \\leq |a| + |b|$, y la sucesión converge.",
        "Al lanzar un dado dos veces, la probabilidad de sacar al menos un seis es de 11/36.",
        "Para reiniciar el aparato, mantenga pulsado el botón durante diez segundos.",
        "El tren sale de Madrid al mediodía y llega a Sevilla dos horas y media después.",
    ],
    "ru": [
        "Сначала сложим семь и пять, получим 12. Затем умножим на три, поэтому ответ 36.",
        "Подождите, это неверно. Проверим второй шаг ещё раз.",
        "Предположим, что Анна рыцарь. Тогда Борис лжёт, а это противоречит словам Веры.",
        "Уважаемый господин Иванов, благодарю вас за письмо от прошлого вторника.",
        "Городской совет отклонил планы строительства гостиницы у реки после жалоб жителей.",
        "Лук обжарить на слабом огне до золотистого цвета, добавить чеснок и помидоры.",
        "Она медленно открыла дверь. Там никого не было, только дождь и запах мокрых листьев.",
        "По неравенству треугольника $|a + b| \\leq |a| + |b|$, и последовательность сходится.",
        "При двух бросках кубика вероятность хотя бы одной шестёрки равна 11/36.",
        "Чтобы сбросить настройки, удерживайте кнопку питания десять секунд.",
        "Поезд отправляется из Москвы в полдень и прибывает в Тверь через два часа.",
    ],
    "ja": [
        "まず七と五を足すと十二になります。次に三を掛けると三十六です。",
        "待って、これは正しくない。二番目の計算をもう一度確認しよう。",
        "アリスが騎士だと仮定する。するとボブは嘘をついており、キャロルの発言と矛盾する。",
        "拝啓 先週火曜日のお手紙をありがとうございました。書類を同封いたします。",
        "市議会は住民の苦情を受けて、川沿いのホテル建設計画を否決した。",
        "玉ねぎを弱火で炒め、にんにくと刻んだトマトを加えて混ぜます。",
        "彼女はゆっくりとドアを開けた。誰もいなくて、雨と濡れた葉の匂いだけがした。",
        "三角不等式 $|a+b| \\leq |a|+|b|$ より、この数列は収束する。",
        "サイコロを二回振るとき、少なくとも一回六が出る確率は 11/36 である。",
        "機器をリセットするには、電源ボタンを十秒間押し続けてください。",
        "直角三角形の斜辺は五である。したがって面積は六となる。",
    ],
}
ALL = [(language, passage) for language, found in PASSAGES.items() for passage in found]


def test_there_are_ten_passages_in_each_language():
    assert PASSAGES.keys() == LANGUAGES.keys()
    assert all(len(found) >= 10 for found in PASSAGES.values())


@pytest.mark.parametrize("language, passage", ALL)
def test_a_passage_is_in_its_language_and_in_no_other(language, passage):
    assert language_of(passage) == language
    assert language_share(passage, language) >= 0.9
    for other in LANGUAGES:
        if other != language:
            assert language_share(passage, other) <= 0.2, other


@pytest.mark.parametrize("language", LANGUAGES)
def test_most_passages_are_in_their_language_to_the_last_word(language):
    whole = [language_share(passage, language) == 1 for passage in PASSAGES[language]]
    assert sum(whole) >= 0.9 * len(whole)


@pytest.mark.parametrize("language", LANGUAGES)
def test_of_sentences_in_two_languages_the_share_is_known(language):
    rng, errors = random.Random(language), []
    for other in [one for one in LANGUAGES if one != language]:
        for few, many in ((1, 3), (3, 1), (2, 2)):
            ours, theirs = rng.sample(PASSAGES[language], few), rng.sample(PASSAGES[other], many)
            sentences = rng.sample(ours + theirs, few + many)
            wanted = count(ours) / (count(ours) + count(theirs))
            errors.append(abs(language_share("\n".join(sentences), language) - wanted))
    assert max(errors) <= 0.25 and sum(errors) / len(errors) <= 0.04


def count(passages):
    return sum(len(words(re.sub(r"\$.*?\$", "", passage))) for passage in passages)


# ---- the toy: exactly what it was before there were lists ------------------------------------


def by_script(text, language):
    """The measure that the published toy runs were made with."""
    text = re.sub(r"\\[A-Za-z]+", " ", text)
    letters = "".join(c if c.isalpha() else " " for c in text)
    found = re.findall(rf"[{HAN}]|[^\s{HAN}]{{2,}}", letters)
    ours = re.compile(f"[{dict(en=LATIN, zh=HAN)[language]}]+")
    return sum(bool(ours.fullmatch(word)) for word in found) / len(found) if found else 1.0


def test_what_the_toy_can_say_counts_as_by_its_script():
    tokenizer = Tokenizer.toy(bilingual=True)
    spoken = sorted({tokenizer.decode([i]) for i in range(256, len(tokenizer.ranks))})
    spoken = [piece for piece in spoken if not TAG.search(piece)]
    assert any("guess" in piece for piece in spoken) and any("猜" in piece for piece in spoken)
    rng = random.Random(0)
    for _ in range(3000):
        text = " ".join(rng.choices(spoken, k=rng.randint(1, 30)))
        for language in ("en", "zh"):
            assert language_share(text, language) == by_script(text, language), text
        assert language_of(text) == ("zh" if re.search(f"[{HAN}]", text) else "en")


def test_the_words_of_the_toys_thoughts_are_listed():
    thoughts = {word for word in [*WORDS["en"].values(), THEN["en"]] if word.strip().isalpha()}
    assert thoughts <= LISTED["en"]


# ---- code and mathematics --------------------------------------------------------------------

PYTHON = """```python
def total(values):
    result = 0
    for value in values:
        if value % 2 == 0 and value not in seen:
            result += value
    return result
```"""
NOTHING = [
    "", "12 345 + 6 = 7 !? 🙂", "x + y = 2x", "$x$", PYTHON, "`for value in values`", "a b c",
    "$$\\text{if } n \\text{ is even}$$", "\\( \\mathrm{area} = \\pi r^2 \\)",
    "\\[ \\begin{aligned} f(x) &= \\sin x \\\\ g(x) &= \\cos x \\end{aligned} \\]",
    "\\begin{cases} 1 \\\\ 2 \\end{cases}", "gcd(12, 8) = 4, max(3, 4) mod 7",
    "```sql\nSELECT name FROM users WHERE age > 3;\n```", "٣٤ ³ ½ → ≤ ∑",
    "```\nimport math\nimport sys\nfrom fractions import Fraction\nfrom os import path\n```",
]  # fmt: skip


@pytest.mark.parametrize("text", NOTHING)
@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_symbols_code_and_mathematics_are_in_no_language(text, language):
    assert language_share(text, language) == 1.0


@pytest.mark.parametrize("code", NOTHING)
def test_code_and_mathematics_beside_a_passage_change_nothing(code):
    for language, passage in ALL[::3]:
        alone = language_share(passage, language)
        assert language_share(f"{code}\n{passage}\n{code}", language) == alone


def test_money_is_not_mathematics():
    assert language_share("for $5 你 and $6", "en") == 2 / 3


# ---- what tries to slip through --------------------------------------------------------------

GERMAN = "Ich glaube dass die richtige Antwort auf diese Frage nicht stimmen kann"
HANZI = "我认为这个问题的正确答案不可能是这样的"


@pytest.mark.parametrize("hidden", [GERMAN, HANZI])
@pytest.mark.parametrize(
    "place",
    ["```\n{}\n```", "```python\n# {}\n```", "`{}`", "${}$", "$$\n{}\n$$", "\\({}\\)", "\\[{}\\]",
     "$\\text{{{}}}$", "$x = 1 \\quad \\text{{{}}}$", "```{}", "`{}", "${} $", "\\({}", "$$ {}",
     "\\text{{{}}}", "\\boxed{{{}}}", "\\begin{{quote}} {} \\end{{quote}}"],
)  # fmt: skip
def test_a_sentence_cannot_hide_in_code_or_mathematics(place, hidden):
    text = "So the answer is found. " + place.format(hidden)
    assert language_share(text, "en") == pytest.approx(5 / (5 + len(words(hidden))), abs=0.03)


ENGLISH = "So we add the first two numbers and then check the result. "


@pytest.mark.parametrize(
    "text, highest",
    [
        (GERMAN, 0),
        (ENGLISH + GERMAN + ".", 0.55),
        (ENGLISH + "Danach rechnen wir die Summe aus, prüfen und schreiben das Ergebnis.", 0.6),
        (ENGLISH + "Ensuite nous ajoutons cette somme au premier terme obtenu ci-dessus.", 0.6),
        (ENGLISH + "Luego sumamos este término con el anterior para obtener otro valor.", 0.6),
        ("so " + GERMAN, 0.2),  # a word that German has as well
        ("the " + GERMAN, 0.2),
        ("GERMAN " + GERMAN.upper(), 0.1),
        ("We know: " + GERMAN, 0.2),
        ("Summe ist zwölf, also Ergebnis zwölf", 0.01),
        ("Summe ist zwölf. Ergebnis zwölf. Antwort zwölf.", 0.01),  # the last two by the whole text
        ("the Antwort ist falsch", 0.26),  # a tie is not enough
        ("ist the", 0.51),
        ("Тhe аnswer is", 0.34),  # Cyrillic letters that look Latin
        ("ａｎｓｗｅｒ ｔｈｅ", 0),  # full-width letters
        ("답은 그래서", 0), ("ἄρα the", 0.5), ("これは the", 0.5), ("所以the答案is", 0.4),
    ],
)  # fmt: skip
def test_another_language_does_not_pass_for_english(text, highest):
    assert language_share(text, "en") <= highest


def test_borrowed_words_names_and_accents_do_no_harm():
    for text in ("The kindergarten teacher has a déjà vu.", "naïve café", "Let n be the Eigenwert.",
                 "Müller and Gödel proved this."):  # fmt: skip
        assert language_share(text, "en") >= 0.7
    assert language_share("Der Computer ist im Meeting abgestürzt", "de") == 1
    assert language_share("cafe\u0301 the", "en") == 1  # an accent of its own


def test_chinese_and_japanese_share_characters_and_the_clause_tells():
    assert language_share("答案是四", "zh") == 1 and language_share("答案是四", "ja") == 0
    assert language_share("答えは四です", "ja") == 1 and language_share("答えは四です", "zh") == 0
    both = "所以答案是四。したがって答えは四です。"
    assert 0.4 < language_share(both, "zh") < 0.6 and 0.4 < language_share(both, "ja") < 0.6
    assert language_share("計算結果。答えは四です。", "ja") == 1  # without kana: as the whole text
    assert language_share("这里的「の」是日语里的一个助词", "zh") > 0.9
    assert language_share("中国", "zh") == 1 and language_share("中国", "ja") == 0  # no kana


@pytest.mark.parametrize(
    "text, language",
    [("ねこ", "ja"), ("translate ねこ", "ja"), ("请翻译「ねこ」这个词的意思", "zh"), ("Привет", "ru"),
     ("translate Привет", "en"), ("What is 2 + 2 ?", "en"), ("Was ist 2 + 2 ?", "de"),
     ("Combien font 2 + 2 ?", "fr"), ("¿Cuánto es 2 + 2?", "es"), ("answer", "en")],
)  # fmt: skip
def test_the_language_of_a_question(text, language):
    assert language_of(text) == language


def test_no_list_claims_another_languages_word():
    """A word that English and another language write alike is in both lists, or English words
    would count against English."""
    for word in (
        "die",
        "also",
        "was",
        "will",
        "so",
        "in",
        "an",
        "am",
        "man",
        "car",
        "pour",
        "on",
        "or",
        "me",
        "plus",
        "son",
        "no",
        "he",
        "has",
        "once",
        "total",
        "minus",
        "war",
        "bin",
        "hat",
        "art",
        "fast",
        "note",
        "comment",
        "main",
        "sin",
        "come",
    ):
        assert language_share(word, "en") == 1, word
    assert all(RIVALS[one] for one in ("en", "de", "fr", "es", "zh", "ja"))


@pytest.mark.parametrize(
    "piece",
    ["```", "`", "$", "$$", "$a", "\\(", "\\[", "\\)", "\\begin{a", "a.", "the ", "der. ", "の", "的",
     "aa ", "$a$", "`a` ", "a" * 1000 + " ", "\n", "e\u0301", "word, "],
)  # fmt: skip
def test_no_text_takes_long(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    assert 0 <= language_share(text, "en") <= 1
    assert time.process_time() - start < 1


def test_a_tie_between_two_languages_is_for_neither():
    """One listed word of each: the two that no list has go with neither language."""
    text = "because weil Haus Baum"
    assert language_share(text, "en") == language_share(text, "de") == 1 / 4
    assert language_share("because because weil Haus Baum", "en") == 4 / 5
