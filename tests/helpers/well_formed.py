"""HTML that closes what it opens, in order."""

import html.parser


class Checker(html.parser.HTMLParser):
  """Every element closed in order, no id twice, nothing fetched."""

  VOID = ('meta', 'img', 'br')

  def __init__(self):
    super().__init__()
    self.open, self.ids, self.links, self.text = [], [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)
    attrs = dict(attrs)
    self.ids += [attrs['id']] if 'id' in attrs else []
    self.links += [
      v for k, v in attrs.items() if k in ('href', 'src', 'xlink:href')
    ]

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.text.append(data)


def parsed(text):
  checker = Checker()
  checker.feed(text)
  assert not checker.open
  return checker
