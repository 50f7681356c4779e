"""The texts of the project, and the pieces of code in them."""

import os
import re

from conftest import ROOT

TEXTS = {}
for _name in ('README.md', 'examples/README.md', 'tests/README.md'):
    with open(os.path.join(ROOT, _name), encoding='utf-8') as _file:
        TEXTS[_name] = _file.read()
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)


class Piece:
    """A piece of code in a text: where it is, its language, and the output that follows it."""

    def __init__(self, name, found):
        text = TEXTS[name]
        titles = re.findall(r'^#+ (.+)$', FENCE.sub('', text[:found.start()]), re.M)
        self.name, self.title = name, titles[-1]
        self.language, self.code = found.groups()
        after = re.match(r'\n\n```\n(.*?)^```$', text[found.end():], re.M | re.S)
        self.output = after.group(1) if after else None

    def __repr__(self):
        return ': '.join(self.key())

    def key(self):
        """What OUTPUTS and FILES know it by."""
        return ('README' if self.name == 'README.md' else 'guide', self.title)


PIECES = [
    Piece(_name, _found)
    for _name in ('README.md', 'examples/README.md') for _found in FENCE.finditer(TEXTS[_name])]
