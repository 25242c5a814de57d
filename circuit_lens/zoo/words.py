"""Word tables: antonyms in four languages, their topics, synonyms, and the words of the filler prose."""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGES = ("English", "French", "Spanish", "Chinese")

# topic: a pair in English, French, Spanish and Chinese
_ANTONYMS = """
size: small big petit grand pequeño grande 小 大
temperature: hot cold chaud froid caliente frío 热 冷
speed: fast slow rapide lent rápido lento 快 慢
age: new old nouveau vieux nuevo viejo 新 旧
quality: good bad bon mauvais bueno malo 好 坏
height: high low haut bas alto bajo 高 低
length: long short long court largo corto 长 短
wealth: rich poor riche pauvre rico pobre 富 穷
strength: strong weak fort faible fuerte débil 强 弱
weight: light heavy léger lourd ligero pesado 轻 重
access: open closed ouvert fermé abierto cerrado 开 关
content: full empty plein vide lleno vacío 满 空
mood: happy sad heureux malheureux feliz triste 乐 悲
hygiene: clean dirty propre sale limpio sucio 净 脏
moisture: dry wet sec mouillé seco mojado 干 湿
hardness: hard soft dur mou duro blando 硬 软
timing: early late tôt tard temprano tarde 早 晚
distance: near far proche loin cerca lejos 近 远
correctness: right wrong juste faux correcto incorrecto 对 错
color: black white noir blanc negro blanco 黑 白
daytime: day night jour nuit día noche 昼 夜
direction: up down montée descente arriba abajo 上 下
feeling: love hate amour haine amor odio 爱 恨
existence: life death vie mort vida muerte 生 死
conflict: war peace guerre paix guerra paz 战 和
truth: true false vrai mensonger verdadero falso 真 假
youth: young aged jeune âgé joven anciano 少 老
thickness: thick thin épais mince grueso delgado 厚 薄
width: wide narrow large étroit ancho estrecho 宽 窄
depth: deep shallow profond superficiel profundo superficial 深 浅
difficulty: easy difficult facile ardu fácil arduo 易 难
taste: sweet bitter doux amer dulce amargo 甜 苦
volume: loud quiet bruyant calme ruidoso tranquilo 吵 静
location: inside outside dedans dehors dentro fuera 内 外
order: first last premier dernier primero último 先 后
trade: buyer seller acheteur vendeur comprador vendedor 买 卖
relation: friend enemy ami ennemi amigo enemigo 友 敌
beauty: beautiful ugly beau laid hermoso feo 美 丑
courage: brave cowardly courageux lâche valiente cobarde 勇 怯
safety: safe dangerous sûr périlleux seguro peligroso 安 危
"""

SYNONYMS = tuple(
    tuple(pair.split())
    for pair in (
        "small little;big large;hot warm;cold chilly;fast quick;slow sluggish;new modern;old ancient;good fine;"
        "bad awful;rich wealthy;"
        "poor needy;strong powerful;weak feeble;happy glad;sad unhappy;clean pure;dirty filthy;wet damp;"
        "hard solid;beautiful pretty;brave bold;safe secure;easy simple;difficult tough;loud noisy;quiet silent;"
        "true correct;false untrue;dangerous risky"
    ).split(";")
)

THINGS = tuple(
    tuple(line.split("|"))
    for line in (
        "dog|loyal animal;cat|small animal;lion|wild animal;whale|large animal;eagle|wild bird;salmon|river fish;"
        "rose|red flower;tulip|spring flower;oak|tall tree;gold|yellow metal;iron|gray metal;guitar|string instrument;"
        "violin|string instrument;drum|loud instrument;Samsung|Korean company;Toyota|Japanese company;"
        "Siemens|German company;Ferrari|Italian company;Nokia|Finnish company"
    ).split(";")
)

FIRST_NAMES = tuple("Maria Anna David Lucas Sofia Julia Laura Mark Nina Paul Alice Sarah Clara Oscar".split())
ANIMALS = {
    "English": tuple("dog cat lion horse bird fox bear rabbit cow sheep".split()),
    "French": tuple("chien chat tigre cheval oiseau renard ours lapin".split()),
    "Spanish": tuple("perro gato león caballo pájaro zorro oso conejo".split()),
}
VERBS = tuple("sat slept ran walked played waited jumped stood".split())
PREPOSITIONS = tuple("on near under behind beside".split())
NOUNS = tuple("mat chair table river house tree garden road bridge wall".split())
NUMBERS = tuple(str(number) for number in range(100))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SEQUENCES = (
    tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    tuple("January February March April May June July August September October November December".split()),
)


@dataclass(frozen=True, slots=True)
class Antonyms:
    """A pair of opposites; ``words[language][side]`` with side 0 or 1; ``index`` is the pair's place in the table."""

    index: int
    topic: str
    words: dict[str, tuple[str, str]]

    def concept(self, side: int) -> str:
        """The language-neutral name of one side: its English word."""
        return self.words["English"][side]


def load_antonyms() -> list[Antonyms]:
    """All pairs of opposites."""
    pairs = []
    for index, line in enumerate(_ANTONYMS.strip().splitlines()):
        topic, text = line.split(": ")
        words = text.split()
        by_language = {
            language: (words[2 * number], words[2 * number + 1]) for number, language in enumerate(LANGUAGES)
        }
        pairs.append(Antonyms(index, topic, by_language))
    return pairs
