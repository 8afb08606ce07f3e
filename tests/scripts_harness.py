"""Texts in several scripts and shapes, put together from phrases by a seed."""

import pathlib
import random
import sysconfig

# When, who, and what they did: each of one is followed by each of the next.
_CHINESE = (
  "昨天早上|去年冬天|吃过晚饭以后|一到周末|下大雨的时候|放学以后",
  "我的奶奶|邻居家的孩子|那位年轻的老师|我们几个同学|卖水果的老人|村里的医生",
  "总是坐在院子里的大树下讲过去的故事|沿着河边慢慢地走到镇上去买菜"
  "|喜欢一个人在图书馆里安静地看书|为了明天的工作准备到很晚"
  "|带着自己做的点心去看望生病的朋友|把旧自行车修好以后送给了别人",
)
_HINDI = (
  "कल सुबह|पिछले साल सर्दियों में|खाना खाने के बाद|रविवार को|बारिश के बाद|शाम को",
  "मेरी दादी ने|पड़ोस के लड़के ने|गाँव के डॉक्टर ने|हमारी अध्यापिका ने|बूढ़े किसान ने",
  "पुराने पेड़ के नीचे बैठकर बच्चों को एक लंबी कहानी सुनाई"
  "|नदी के किनारे चलते हुए बाज़ार से ताज़ी सब्ज़ियाँ खरीदीं"
  "|पुस्तकालय में चुपचाप बैठकर एक नई और रोचक किताब पढ़ी"
  "|बीमार दोस्त के लिए अपने हाथ से मीठी खीर बनाई"
  "|टूटी हुई साइकिल ठीक करके अपने मित्र को दे दी",
)
_ARABIC = (
  "في صباح أمس|في الشتاء الماضي|بعد العشاء|في آخر الأسبوع|حين نزل المطر",
  "كان جدي|كان الجار|كان الطبيب الشاب|كان معلم القرية|كان بائع الفاكهة",
  "يجلس تحت الشجرة الكبيرة ويحكي للأطفال قصة طويلة عن الماضي"
  "|يذهب إلى السوق القريب من النهر ليشتري خبزا وخضارا للبيت"
  "|يقرأ كتابا جديدا في المكتبة الهادئة ثم يكتب رسالة إلى صديقه"
  "|يصلح الدراجة القديمة بيديه ثم يهديها إلى ابن الجيران الصغير"
  "|يزور صديقه المريض ويحمل إليه طعاما أعده بنفسه",
)
_THAI = (
  "เมื่อวานตอนเช้า|ปีที่แล้วในฤดูหนาว|หลังอาหารเย็น|วันอาทิตย์|ตอนฝนตก",
  "คุณยายของฉัน|เด็กข้างบ้าน|ครูประจำหมู่บ้าน|หมอหนุ่ม|คนขายผลไม้",
  "นั่งเล่านิทานเรื่องยาวใต้ต้นไม้ใหญ่ให้เด็กฟัง|เดินไปตลาดริมแม่น้ำเพื่อซื้อผักสด"
  "|อ่านหนังสือเล่มใหม่ในห้องสมุดที่เงียบสงบ|ซ่อมจักรยานเก่าแล้วให้เพื่อนไป",
)
_ENGLISH = (
  "yesterday morning|last winter|after supper|every Sunday|when it rained",
  "my grandmother|the boy next door|the young doctor|our teacher|an old farmer",
  "sat below the great tree and told the children a long story"
  "|walked along the river to the market to buy bread and apples"
  "|read a new book in the quiet library and then wrote a letter"
  "|mended the broken bicycle and gave it to a friend",
)
_FIRST = "Ada Bruno Carla Dmitri Elif Farid Greta Hana Ivo Jun Karin Luis Mei"
_LAST = "Almeida Berg Costa Dvorak Eriksen Fuchs Gupta Haddad Ito Jansen Kaya"
_MODULES = "bisect cmd copy csv fileinput fnmatch getopt glob heapq linecache"
_MODULES += " netrc numbers queue quopri reprlib sched shelve shlex stat string"
_MODULES += " tabnanny textwrap timeit zipapp"


def _phrases(parts, gap, end, count, choose):
  choices = [part.split("|") for part in parts]
  return [gap.join(map(choose.choice, choices)) + end for _ in range(count)]


def chinese(choose, count=60):
  """Sentences that end in a mark, without any space."""
  return "".join(_phrases(_CHINESE, "", "。", count, choose))


def hindi(choose, count=60):
  """Sentences that end in a danda."""
  return " ".join(_phrases(_HINDI, " ", "।", count, choose))


def arabic(choose, count=60):
  """Sentences, some of them questions, with the mark turned round."""
  marks = lambda: choose.choice("..؟")
  return " ".join(
    _phrases(_ARABIC, " ", marks(), 1, choose)[0] for _ in range(count)
  )


def thai(choose, count=60):
  """No marks, and spaces between sentences only; a paragraph a line."""
  found = _phrases(_THAI, "", "", count, choose)
  lines = [found[i : i + 6] for i in range(0, count, 6)]
  return "\n".join(map(" ".join, lines))


def names(choose, count=200):
  """A list, one item a line."""
  both = _FIRST.split(), _LAST.split()
  return "\n".join(" ".join(map(choose.choice, both)) for _ in range(count))


def one_line(choose, characters):
  """English without marks and line breaks."""
  found = _phrases(_ENGLISH, " ", "", characters // 50, choose)
  return " ".join(found)[:characters]


def english(choose, count=4):
  """Sentences, with a space between."""
  found = _phrases(_ENGLISH, " ", ".", count, choose)
  return " ".join(sentence.capitalize() for sentence in found)


def genes(choose, characters):
  """One word."""
  return "".join(choose.choices("ACGT", k=characters))


def documents(kind, line=300_000):
  """Returns the documents of a kind, always the same.

  Args:
    kind: a function of this file, or "python".
    line: characters of what is one line.
  """
  choose = random.Random(0)
  if kind == "python":
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [stdlib / f"{name}.py" for name in _MODULES.split()]
    return [path.read_text() for path in paths if path.exists()]
  make = globals()[kind]
  if kind in ("one_line", "genes"):
    return [make(choose, line)]
  return [make(choose) for _ in range(24)]


def write(kind, folder, line=300_000):
  """Writes the documents into a folder; returns the corpus to configure."""
  for i, text in enumerate(documents(kind, line)):
    (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
  return f"text:{folder}/*.txt"
