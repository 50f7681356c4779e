"""The tuples of this project whose items have names do what those of `typing` do."""

import pickle
import typing

import pytest

import dispynode


class Ours(dispynode.NamedTuple):
    """Text."""
    one: int
    two: str
    three: float = 3.0

    @property
    def both(self):
        return self.one, self.two


class Theirs(typing.NamedTuple):
    """Text."""
    one: int
    two: str
    three: float = 3.0

    @property
    def both(self):
        return self.one, self.two


class Empty(dispynode.NamedTuple):
    """Nothing."""


@pytest.mark.parametrize('args, names', [
    ((1, 'two', 4.0), {}), ((1, 'two'), {}), ((1, ), {'two': 'two'}),
    ((), {'two': 'two', 'one': 1, 'three': None})])
def test_they_are_made_so(args, names):
    ours, theirs = Ours(*args, **names), Theirs(*args, **names)
    assert ours == theirs == tuple(theirs) and hash(ours) == hash(theirs)
    assert repr(ours) == repr(theirs).replace('Theirs', 'Ours')
    assert (ours.one, ours.two, ours.three) == tuple(ours) and ours.both == theirs.both
    assert ours._asdict() == theirs._asdict()
    other = ours._replace(two='2')
    assert type(other) is Ours and other == theirs._replace(two='2')
    assert type(Ours._make(theirs)) is Ours and Ours._make(iter(theirs)) == theirs
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(ours, protocol))
        assert type(again) is Ours and again == ours


@pytest.mark.parametrize('args, names', [
    ((), {}), ((1, ), {}), ((1, 2, 3, 4), {}), ((1, 2), {'one': 1}), ((1, 2), {'four': 4}),
    ((1, 2, 3), {'three': 3})])
def test_wrong_values_are_refused(args, names):
    for kind in (Ours, Theirs):
        with pytest.raises(TypeError):
            kind(*args, **names)


def test_they_have_no_attributes_beside_their_items():
    ours = Ours(1, 'two')
    for name in ('one', 'four'):
        with pytest.raises(AttributeError):
            setattr(ours, name, 1)
    assert Ours._fields == Theirs._fields and Ours.__doc__ == Theirs.__doc__
    assert Ours._field_defaults == Theirs._field_defaults
    assert Empty() == () and Empty._fields == () and repr(Empty()) == 'Empty()'
    with pytest.raises(TypeError):
        Empty(1)


def test_the_class_may_be_a_base():
    class More(Ours):
        """With a method."""
        def first(self):
            return self.one

    assert More(1, 'two').first() == 1 and isinstance(More(1, 'two'), Ours)
    assert repr(More(1, 'two')) == "More(one=1, two='two', three=3.0)"
