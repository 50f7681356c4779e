"""Figures of how the code reads, and the limits for them.

    python tests/house.py            the figures of the four modules, and which pass a limit
    python tests/house.py FILE...    the same for other files

The size of a statement is the number of nodes that it has in the syntax tree, without those of
the statements inside it; how it is formatted does not matter. Docstrings and tables (displays that
are assigned in a module or a class) are not counted. `tests/unit/test_style.py` fails if a figure
passes its limit.
"""

import ast
import itertools
import os
import sys

LIMITS = {
    'mean': 6.5,       # the mean size of a statement
    'large': 0.5,      # per cent of the statements that are larger than LARGE
    'nested': 0,       # conditional expressions inside conditional expressions
    'wide': 0,         # lines of more than WIDTH columns
    'class': 400,      # lines of the longest class, without docstrings
    'classes': 0,      # classes that are longer
    'branches': 14,    # branches of the function that has most, without functions inside it
    'functions': 0,    # functions that have more
}
FOREIGN = 99           # private attributes of other objects that are used, in all modules together
LARGE = 25
WIDTH = 100

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = ('dispynode.py', 'dispy.py', 'dispyscheduler.py', 'dispy_httpd.py')

CONTEXTS = (ast.Load, ast.Store, ast.Del)
DISPLAYS = (ast.List, ast.Tuple, ast.Set, ast.Dict)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.IfExp, ast.BoolOp, ast.ExceptHandler) + LOOPS + COMPREHENSIONS


def below(node, *without):
    """Yield all nodes below a node, but none that is of a kind `without`, nor what is below it."""
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        node = waiting.pop()
        if not isinstance(node, without):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_table(node):
    return isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, DISPLAYS)


def statements(tree):
    """Yield the statements that are counted; a definition counts by those inside it."""
    for parent in ast.walk(tree):
        may_have_tables = isinstance(parent, (ast.Module, ast.ClassDef))
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.stmt) or isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                continue
            if is_docstring(node) or (may_have_tables and is_table(node)):
                continue
            yield node


def size_of(statement):
    own = below(statement, ast.stmt, ast.ExceptHandler)
    return 1 + sum(not isinstance(node, CONTEXTS) for node in own)


def length_of(node):
    """The number of lines of a class without its docstrings and those inside it."""
    texts = filter(is_docstring, ast.walk(node))
    return lines_of(node) - sum(map(lines_of, texts))


def lines_of(node):
    return node.end_lineno - node.lineno + 1


def branches_of(function):
    own = below(function, ast.ClassDef, *FUNCTIONS)
    return sum(isinstance(node, BRANCHES) for node in own)


def is_foreign(node):
    """Whether a node uses a private attribute of anything but self and cls."""
    if not isinstance(node, ast.Attribute):
        return False
    if not node.attr.startswith('_') or node.attr.endswith('__'):
        return False
    owner = node.value
    return not isinstance(owner, ast.Name) or owner.id not in ('self', 'cls')


class Figures:
    """The figures of one file by their names in LIMITS, and which classes and functions they
    mean."""

    def __init__(self, text):
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
        sizes = [size_of(statement) for statement in statements(tree)]
        self.classes = longest_first(nodes, ast.ClassDef, length_of)
        self.functions = longest_first(nodes, FUNCTIONS, branches_of)
        self.foreign = sum(map(is_foreign, nodes))
        self.by_name = {
            'mean': sum(sizes) / max(len(sizes), 1),
            'large': 100 * sum(size > LARGE for size in sizes) / max(len(sizes), 1),
            'nested': sum(nested_in(node) for node in nodes),
            'wide': sum(len(line) > WIDTH for line in text.splitlines()),
            'class': largest(self.classes),
            'classes': len(self.above('class')),
            'branches': largest(self.functions),
            'functions': len(self.above('branches')),
        }

    def above(self, name):
        """Which classes or functions pass the limit: rows (figure, name)."""
        rows = self.classes if name == 'class' else self.functions
        return list(itertools.takewhile(lambda row: row[0] > LIMITS[name], rows))


def longest_first(nodes, kinds, measure):
    rows = [(measure(node), node.name) for node in nodes if isinstance(node, kinds)]
    return sorted(rows, reverse=True)


def largest(rows):
    return rows[0][0] if rows else 0


def nested_in(node):
    """How many conditional expressions a conditional expression has inside it."""
    if not isinstance(node, ast.IfExp):
        return 0
    return sum(isinstance(inner, ast.IfExp) for inner in below(node))


def figures_of(path):
    with open(path, encoding='utf-8') as file:
        return Figures(file.read())


def complaints(name, figures):
    """A line for each figure of a file that passes its limit."""
    return ['%s: %s is %.4g, and may be %g at most' % (name, figure, value, LIMITS[figure])
            for figure, value in figures.by_name.items() if value > LIMITS[figure]]


def shown(name, figures):
    values = ', '.join('%s %.4g' % row for row in figures.by_name.items())
    lines = ['%s: %s, private attributes of others %d' % (name, values, figures.foreign)]
    for figure in ('class', 'branches'):
        above = figures.above(figure)
        if above:
            names = ', '.join('%s %d' % (name, value) for value, name in above)
            lines.append('  more than %d (%s): %s' % (LIMITS[figure], figure, names))
    return '\n'.join(lines)


def main(arguments):
    paths = [word for word in arguments if not word.startswith('-')]
    paths = paths or [os.path.join(ROOT, name) for name in MODULES]
    all_figures = {os.path.basename(path): figures_of(path) for path in paths}
    found = []
    for name, figures in all_figures.items():
        print(shown(name, figures))
        found += complaints(name, figures)
    foreign = sum(figures.foreign for figures in all_figures.values())
    if foreign > FOREIGN:
        found.append('%d private attributes of others, and there may be %d at most'
                     % (foreign, FOREIGN))
    for text in found:
        print(text)
    return int(bool(found))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
