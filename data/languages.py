"""Which language a text is in, word by word: what R1's language reward counts (R1 2.3.2).

A script tells Chinese from Russian, but English, German, French and Spanish share the letters of
theirs, and Chinese and Japanese their characters. There short lists of frequent words decide:

    A word in the target's script counts if only the target lists it, and does not if only others
    do. Any other one goes with its clause: it counts, unless another language has as many listed
    words there that the target lacks or, where the clause has none of either, in the whole text.

(Between Chinese and Japanese a character by itself decides nothing: its clause does, by the kana
against the characters that are frequent in Chinese only.)

So a German sentence in an English answer counts against it, the words that no list has included;
a name, a rare word or a text of numbers does no harm. German nouns between English function words
are taken for English: to tell, one needs a dictionary.

Numbers, symbols, code and mathematics are in no language. What could hide there is not left out:
whatever is never closed, and, within code or mathematics, `SENTENCE` words in a row.

Read next: ../rewards.py (language_reward).
Check it: python -m pytest tests/test_languages.py
"""

import re
import unicodedata

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3005\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9d"
LATIN = "A-Za-z\u00c0-\u024f"
# The letters of each language's script. Ukrainian's \u0456 is no letter of Russian.
LANGUAGES = {"en": LATIN, "zh": HAN, "de": LATIN, "fr": LATIN, "es": LATIN,
             "ru": "\u0401\u0410-\u044f\u0451", "ja": HAN + KANA}  # fmt: skip

# What is frequent in reasoning, too. A word that two languages write alike stands in both lists
# (a die, a car; plus): it counts for either, and is no sign of one.
LISTS = {
    "en": """
        about after all also although always am an and another answer any are as assume at be
        because been before between both but by calculate can car check compute could did die do
        does done each easy either else equal equals even every false find first for from get give
        gives guess had has hat have he hence her here his how however if in into is it its just
        know last left less let like man many may me mean means minus more most much must my need
        next no non not now number numbers of on once one only or other our out over par plus pour
        problem question result right same second see she should since so solution solve some son
        step still such suppose take than that the their them then there therefore these they think
        third this those three thus times to together too total true two under until up use using
        value verify very wait want was way we were what when where which while who why will with
        without would wrong yes yet you your
    """,
    "de": """
        aber addieren alle allem allen aller alles als also am an andere anderen antwort auch auf
        aus bedeutet bei beide beiden beim berechne berechnen bis bleiben bleibt da dabei daher
        damit danach dann daraus das dass davon dazu daß dem den denn der des deshalb die diese
        diesem diesen dieser dieses doch dort drei du durch ein eine einem einen einer eines einmal
        er ergebnis ergibt es etwa etwas falls falsch frage für gegeben genau gibt gilt gleich
        gleichung habe haben hat her hier ich ihm ihn ihr immer in insgesamt ist jede jeden jeder
        jedes jedoch jetzt kann kein keine können lösung man mehr mein minus mit muss müssen nach
        nehmen nein nicht nichts noch nun nur ob oder ohne problem prüfe prüfen rechne rechnen
        rechnung richtig schon sehr sein seine sich sie sind so soll sollte somit sondern summe
        total um und uns unter viele vier vom von vor wahr was weil weiter welche welcher welches
        wenn wer werden wie wieder will wir wird wo wobei wurde wurden während zahl zahlen zeigen zu
        zuerst zum zunächst zur zwei zweite zwischen über überprüfen
    """,
    "fr": """
        abord afin ai ainsi alors an après au aucun aussi autre autres aux avait avant avec avoir
        avons calculer calculons car ce ceci cela celle celui ces cet cette chaque chez cinq combien
        comme connaît dans de depuis des deux devons dire dit doit donc donne dont du déjà elle
        elles en encore ensuite entre est et eux fait faut faux font il ils je jusque la le les leur
        leurs lorsque lui mais me moi moins même mêmes ne ni nombre nombres non nos notre nous
        obtient on ont or ou où par parce pas pendant peu peut peuvent plus plusieurs pour pourquoi
        premier première puis puisque quand quatre que quel quelle quels question qui quoi reste
        rien réponse résultat sa sans se sera ses si soit somme son sont sous sur ta total tous tout
        toute toutes trois trouve trouver très tu un une vaut voici vous vrai vérifier vérifions à
        égal égale était été être
    """,
    "es": """
        ahora al algo algunos ambos antes aquí así aunque cada calculamos calcular casi como con
        contra correcto cual cuando cuatro cuál cuánto cuántos cómo de debe debemos decir del desde
        después donde dos dónde el ella ellas ellos en entonces entre era es esa ese eso esta estas
        este esto estos está están falso fue ha hace hacer hacia han has hasta hay he igual la las
        le les lo los luego me menos mi mientras mismo muy más nada ni ningún no nos nosotros
        nuestra nuestro nunca número números o obtenemos once otra otras otro otros para pero poco
        podemos por porque primera primero puede pueden pues que queda quedan quién qué respuesta
        resultado se sea segundo según ser si siempre sino sobre solución son su suma sus sí también
        tanto tenemos tener tiene tienen toda todas todos total tres tu tú un una uno unos usted
        verdadero verificar y ya yo él
    """,
}  # fmt: skip
LISTED = {language: frozenset(LISTS.get(language, "").split()) for language in LANGUAGES}
# Signs of Chinese where no Japanese is: frequent there and rare here, or simplified.
CHINESE = frozenset(
    "的了是我你他她它们这那也很说没么什怎吗呢吧啊把让给对从则时后还设于计检验证错误简单过些谁请总为"
    "這個們沒為說對從與則於嗎"
)
FAMILIES = ("en", "de", "fr", "es"), ("zh", "ja"), ("ru",)  # that share a script
RIVALS = {own: [one for one in family if one != own] for family in FAMILIES for own in family}
ONLY = {(own, rival): LISTED[own] - LISTED[rival] for own in RIVALS for rival in RIVALS[own]}
ONLY["zh", "ja"] = CHINESE

WORD = re.compile(rf"[{HAN}]|[{KANA}]+|[^\s{HAN}{KANA}]{{2,}}")  # one letter is a variable
KANA_WORD = re.compile(f"[{KANA}]+")
CLAUSE_END = re.compile("[.,:;!?\n。，、：；！？…]+")

# ---- what is in no language ----------------------------------------------------------------

# Each alternative either closes or fails within its own text, so that all of it is linear.
SPAN = re.compile(
    r"```.*?```|`[^`\n]+`"  # code
    r"|\$\$[^$]+\$\$|\$(?=\S)[^$\n]+(?<=\S)\$(?![0-9])"  # "$5 and $6" is money
    r"|\\\((?:(?!\\[()]).)*\\\)|\\\[(?:(?!\\[\[\]]).)*\\\]",
    re.DOTALL,
)
COMMAND = re.compile(r"\\(?:begin|end)\{[A-Za-z]*\*?\}|\\[A-Za-z]+")
FUNCTIONS = frozenset("cos cot det exp gcd lcm lim ln log max min mod sin sqrt tan".split())
NOT_PROSE = re.compile(r"[^\w\s,.'，。、]|[\d_\n]|[.,](?=\S)")
SENTENCE = 7  # words in a row


def prose(text: str) -> str:
    """The text without code and mathematics, except for the sentences in them."""

    def sentences(span: re.Match) -> str:
        pieces = NOT_PROSE.split(COMMAND.sub(" | ", span[0]))
        return "\n".join(["", *(piece for piece in pieces if len(words(piece)) >= SENTENCE), ""])

    return COMMAND.sub(" ", SPAN.sub(sentences, text))


def words(clause: str) -> list[str]:
    """Runs of two or more letters, in lower case; of Chinese, which takes a dictionary to cut into
    words, single characters; of kana, runs."""
    letters = "".join(c if c.isalpha() else " " for c in clause.lower())
    return [word for word in WORD.findall(letters) if word not in FUNCTIONS]


def clauses(text: str) -> list[list[str]]:
    """The words of the text, clause by clause; one accented letter may be written as two signs."""
    parts = CLAUSE_END.split(unicodedata.normalize("NFC", prose(text)))
    return [found for part in parts if (found := words(part))]


# ---- counting ------------------------------------------------------------------------------


def signs(found: list[str], language: str, rival: str) -> int:
    """How much speaks for `language` and not for `rival`: its listed words, or its kana."""
    if language == "ja":
        return sum(len(word) for word in found if KANA_WORD.fullmatch(word))
    return sum(word in ONLY[language, rival] for word in found)


def leads(found: list[str], language: str) -> bool | None:
    """Whether these words are `language` rather than one of its rivals; None where nothing tells
    it from one of them, and nothing speaks for another."""
    pairs = [
        (signs(found, language, rival), signs(found, rival, language)) for rival in RIVALS[language]
    ]
    if any(theirs for _, theirs in pairs):
        return all(ours > theirs for ours, theirs in pairs if theirs)  # a tie is not enough
    return True if all(ours for ours, _ in pairs) else None


def language_share(text: str, language: str) -> float:
    """The share of the text's words that are in the language; 1.0 where there are no words."""
    parts = clauses(text)
    total = sum(map(len, parts))
    if not total:
        return 1.0
    whole = leads([word for part in parts for word in part], language)
    if whole is None:
        whole = language != "ja"  # a text without kana is Chinese
    script = re.compile(f"[{LANGUAGES[language]}]+")
    others = frozenset().union(*(LISTED[rival] for rival in RIVALS[language]))
    ours = 0
    for part in parts:
        verdict = leads(part, language)
        rest = whole if verdict is None else verdict
        for word in filter(script.fullmatch, part):
            here, there = word in LISTED[language], word in others
            ours += rest if here == there else here
    # R1 2.3.2, language: Reward_language = Num(Words_target) / Num(Words)
    return ours / total


def language_of(text: str) -> str:
    """ "zh" where there is any Chinese, "ja" and "ru" where kana or Russian letters prevail, and
    "en" where no other language has more of its words."""
    han, kana, russian, latin = (
        len(re.findall(f"[{letters}]", text)) for letters in (HAN, KANA, LANGUAGES["ru"], LATIN)
    )
    if kana > han / 3:
        return "ja"
    if han:
        return "zh"
    if russian > latin:
        return "ru"
    found = [word for part in clauses(text) for word in part]
    known = {one: sum(word in LISTED[one] for word in found) for one in ("en", *RIVALS["en"])}
    return max(known, key=known.__getitem__)  # English where they are equal
