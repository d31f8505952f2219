"""Objects of one process in another: the tests of a data set in one, the program that they test in the other.

Plain data cross by value, as JSON. A function, class or instance of the program stays where it is, and the tests hold a
`Remote` for it: what they do with that is asked of the program's process. A function that tests give to the program
stays with the tests, and the program holds a function that asks for its call. So both ends are the same class, `End`.

The program may be hostile, and nothing that it says is taken for a verdict:

    what arrives becomes built-in types, a few value types of the standard library, exceptions made here, or a `Remote`
    a `Remote` is never equal to plain data, nor smaller nor larger, whatever its class says about `==`
    `x in remote` looks at the items here; only an object that the tests have made from a class is asked itself
    what arithmetic with plain data has made (`remote - 2`) is no number and no truth value: the program has seen the 2

Both processes import this file and nothing else of the project: sandbox.py fences them in.
"""

import builtins
import io
import json
import operator
import os
import sys
import time
from functools import lru_cache
from importlib import import_module

REPLY = 2**24  # bytes of one message
PRINTED = 2**16  # bytes that the program prints in one call, and that tests can see


# ---------------------------------------------------------------- one end of the channel


class Channel:
    """JSON lines to and from the other process."""

    def __init__(self, incoming: int, outgoing: int):
        self.incoming = os.fdopen(incoming, "rb")
        self.outgoing = os.fdopen(outgoing, "wb", buffering=0)
        self.has_ended = False  # the other process; for good, whatever a test makes of the exception

    def send(self, line: str):
        data = memoryview(line.encode() + b"\n")
        try:
            while data:
                data = data[self.outgoing.write(data) :]
        except OSError:
            self.end()

    def receive(self):
        line = self.incoming.readline(REPLY)
        if not line.endswith(b"\n"):
            self.end()
        return json.loads(line)

    def end(self):
        """Raises EOFError."""
        self.has_ended = True
        raise EOFError("the program has ended")


class End:
    """What a process knows of the objects that it shares with the other.

    Args:
        channel: to the other end, which is an End too.
        operate: (name of an operation, arguments, keyword arguments) → result; what the other end may ask for.
        remote: (this end, place, name, whether it is an iterator) → what stands here for an object of the other end.
        printed: () → what has been printed since it was last called, for the other end to print.
    """

    def __init__(self, channel: Channel, operate, remote, printed=lambda: ""):
        self.channel = channel
        self.operate = operate
        self.remote = remote
        self.printed = printed
        self.shared = []  # objects of this process; the other end has their place in this list
        self.places = {}  # id of one of them → its place
        self.remotes = {}  # place in the other end's list → what stands for it here
        self.theirs = {}  # id of what stands for it → its place there

    def ask(self, operation: str, *given, **named):
        """What the other end's operation returns. Raises what it raises."""
        request = ["do", operation, [self.encode(value) for value in given]]
        request.append({name: self.encode(value) for name, value in named.items()})
        self.channel.send(json.dumps(request))
        while (message := self.channel.receive())[0] == "do":  # first it wants something of this end
            self.answer(*message[1:])
        kind, value, changes, printed = message
        if printed:
            print(str(printed), end="")
        if kind == "raise":
            raise self.decode(value)
        arguments = [*given, *named.values()]
        for argument, now in zip(arguments, changes, strict=True):
            if now is not None:
                update(argument, self.decode(now))
        if isinstance(value, dict) and "argument" in value:
            return arguments[value["argument"]]
        return self.decode(value)

    def answer(self, operation: str, given: list, named: dict):
        """Does what the other end asks for, and sends the reply: kind, value, changed arguments, what was printed."""
        try:
            positional = [self.decode(value) for value in given]
            keywords = {name: self.decode(value) for name, value in named.items()}
            result = self.operate(operation, positional, keywords)
            arguments = [*positional, *keywords.values()]
            received = [*given, *named.values()]
            changes = [self.changed(*pair) for pair in zip(arguments, received, strict=True)]
            same = [place for place, argument in enumerate(arguments) if argument is result and is_mutable(result)]
            value = {"argument": same[0]} if same else self.encode(result)
            reply = json.dumps(["result", value, changes, self.printed()])
        except (Exception, SystemExit) as error:
            reply = json.dumps(["raise", self.encode_error(error), [], self.printed()])
        self.channel.send(reply)

    def changed(self, argument, received):
        """An argument as it is now, if what has been done with it has changed it in place; else None."""
        if not is_mutable(argument) or "yours" in received:
            return None
        now = self.encode(argument)
        return None if now == received else now

    def share(self, value) -> int:
        """The place of an object in `shared`."""
        if id(value) not in self.places:
            self.places[id(value)] = len(self.shared)
            self.shared.append(value)
        return self.places[id(value)]

    def stand_in(self, place: int, name: str, is_iterator: bool = False):
        """What stands here for an object of the other end: the same each time."""
        if place not in self.remotes:
            remote = self.remote(self, place, name, is_iterator)
            self.remotes[place] = remote
            self.theirs[id(remote)] = place
        return self.remotes[place]

    def encode(self, value):
        """A value as JSON. Raises TypeError for what cannot cross."""
        if id(value) in self.theirs:
            return {"yours": self.theirs[id(value)]}
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if has_own_methods(kind, value):
            return self.encode_object(value)
        match value:
            case int():
                return {"int": hex(value)}  # whatever its size
            case float():
                return float(value)
            case str():
                return str.__str__(value)
            case list() | set() | frozenset():
                base = next(base for base in COLLECTIONS if isinstance(value, base))
                return {base.__name__: [self.encode(item) for item in value]}
            case tuple() if hasattr(value, "_fields"):
                return {"namedtuple": [kind.__name__, list(value._fields), [self.encode(item) for item in value]]}
            case tuple():
                return {"tuple": [self.encode(item) for item in value]}
            case dict() if kind.__module__ != "collections":
                return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
            case complex():
                return {"complex": [value.real, value.imag]}
            case bytes() | bytearray():
                base = bytes if isinstance(value, bytes) else bytearray
                return {base.__name__: value.decode("latin1")}
            case range() | slice():
                return {kind.__name__: [self.encode(part) for part in (value.start, value.stop, value.step)]}
        if kind in VIEWS:
            return {kind.__name__: [self.encode(item) for item in value]}
        if parts := VALUES.get((kind.__module__, kind.__name__)):
            return {"value": [kind.__module__, kind.__name__, [self.encode(part) for part in parts(value)]]}
        if is_array(value):
            return {"array": [value.dtype.str, list(value.shape), self.encode(value.ravel().tolist())]}
        if hasattr(value, "tolist"):  # NumPy's numbers
            return self.encode(value.tolist())
        return self.encode_object(value)

    def encode_object(self, value):
        """What stays in this process."""
        if isinstance(value, BaseException):
            return self.encode_error(value)
        name = getattr(value, "__name__", "")
        if isinstance(value, type) and getattr(builtins, name, None) is value:
            return {"builtin": name}
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [self.encode_object(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return {"exception": [name, value.__module__, bases, self.share(value)]}
        is_iterator = hasattr(value, "__next__")
        if self.remote is remote_object and not callable(value) and not is_iterator:
            raise TypeError(f"a test gives the program a {type(value).__name__}; it can give plain data and functions")
        return {"mine": [self.share(value), str(name), is_iterator]}

    def encode_error(self, error: BaseException):
        """An exception, with what `except` and `str` have to know."""
        arguments = []
        attributes = {}
        try:
            arguments = [self.encode(argument) for argument in error.args]
            attributes = {name: self.encode(value) for name, value in vars(error).items()}
        except Exception:  # what it holds cannot cross
            arguments = [str(error)[:200]]
        return {"error": [self.encode_object(type(error)), arguments, str(error)[:1000], attributes]}

    def decode(self, value):
        """The inverse of `encode`. Whatever the other end sends, nothing of it is code that runs here."""
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "int":
            return int(content, 16)
        for collection in COLLECTIONS:
            if kind == collection.__name__:
                return collection([self.decode(item) for item in content])
        match kind:
            case "dict":
                return {self.decode(key): self.decode(item) for key, item in content}
            case "yours":
                return self.shared[content]
            case "mine":
                return self.stand_in(int(content[0]), str(content[1]), bool(content[2]))
            case "builtin":
                return builtin_class(content)
            case "exception":
                return self.decode_exception(*content)
            case "error":
                return self.decode_error(*content)
            case "complex":
                return complex(*content)
            case "bytes":
                return content.encode("latin1")
            case "bytearray":
                return bytearray(content.encode("latin1"))
            case "range":
                return range(*map(self.decode, content))
            case "slice":
                return slice(*map(self.decode, content))
            case "namedtuple":
                name, fields, items = content
                from collections import namedtuple

                return namedtuple(name, fields)(*map(self.decode, items))
            case "dict_keys":
                return dict.fromkeys(map(self.decode, content)).keys()
            case "dict_values":
                return dict(enumerate(map(self.decode, content))).values()
            case "dict_items":
                return dict(map(self.decode, content)).items()
            case "array":
                kind, shape, items = content
                found = array(kind, shape, self.decode(items))
                return found.view(array_for_tests()) if self.remote is remote_object else found
            case "value":
                module, name, parts = content
                if (module, name) in VALUES:
                    return getattr(import_module(module), name)(*map(self.decode, parts))
        raise TypeError(f"a value of the kind {kind!r}")

    def decode_exception(self, name: str, module: str, bases: list, place: int) -> type:
        """A class of exceptions of the other end: one made here with the same bases, since `except` needs a class."""
        if place not in self.remotes:
            known = getattr(sys.modules.get(module), name, None) if module in LIBRARY else None
            if not (isinstance(known, type) and issubclass(known, Exception)):
                parents = tuple(self.decode(base) for base in bases)
                known = type(str(name), parents, {"__str__": text_of_error})
            self.remotes[place] = known
            self.theirs[id(known)] = place
        return self.remotes[place]

    def decode_error(self, kind, arguments: list, text: str, attributes: dict) -> BaseException:
        """An exception of the other end."""
        kind = self.decode(kind)
        arguments = [self.decode(argument) for argument in arguments]
        if issubclass(kind, (StopIteration, StopAsyncIteration)) or not issubclass(kind, (Exception, SystemExit)):
            return RuntimeError(f"{kind.__name__}: {text}")  # it would end a loop of the tests, or all of them
        try:
            error = kind(*arguments)
        except TypeError:
            error = kind.__new__(kind)
            error.args = tuple(arguments)
        for name, value in attributes.items():
            if not name.startswith("__"):
                setattr(error, name, self.decode(value))
        if "__str__" in vars(kind) and kind.__module__ == __name__:
            error.__dict__[" text"] = text
        return error


def text_of_error(error) -> str:
    """`str` of an exception that was made here for one of the other end."""
    return vars(error).get(" text", " ".join(map(str, error.args)))


COLLECTIONS = (list, tuple, set, frozenset)
VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
LIBRARY = ("json.decoder", "decimal", "queue", "_queue", "ipaddress", "struct", "re", "binascii")  # with exceptions
VALUES = {  # classes of the standard library that cross by value: what one is made of
    ("decimal", "Decimal"): lambda value: [str(value)],
    ("fractions", "Fraction"): lambda value: [value.numerator, value.denominator],
    ("datetime", "date"): lambda value: [value.year, value.month, value.day],
    ("datetime", "time"): lambda value: [value.hour, value.minute, value.second, value.microsecond, value.tzinfo],
    ("datetime", "datetime"): lambda value: [*value.timetuple()[:6], value.microsecond, value.tzinfo],
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
    ("datetime", "timezone"): lambda value: [value.utcoffset(None)],
    ("collections", "deque"): lambda value: [list(value), value.maxlen],
    ("collections", "Counter"): lambda value: [dict(value)],
    ("collections", "OrderedDict"): lambda value: [list(value.items())],
    ("collections", "defaultdict"): lambda value: [None, dict(value)],
    ("uuid", "UUID"): lambda value: [str(value)],
}


def has_own_methods(kind: type, value) -> bool:
    """Whether it is data and more: of a subclass of a built-in class that has attributes of its own."""
    if kind in (int, str, list, tuple, dict, set) or kind.__module__ in ("collections", "numpy"):
        return False
    for base in (int, str, float, list, tuple, dict, set, frozenset):
        if issubclass(kind, base):
            names = set(dir(value)) - set(dir(base)) - set(getattr(kind, "_fields", ()))  # of a namedtuple
            return any(not name.startswith("_") for name in names)
    return False


def builtin_class(name: str) -> type:
    """A built-in class. Raises TypeError for anything else, such as the function `eval`."""
    found = getattr(builtins, str(name), None)
    if not isinstance(found, type):
        raise TypeError(f"{name!r} is no built-in class")
    return found


def is_array(value) -> bool:
    """Whether it is an array of NumPy's with numbers in it."""
    kind = type(value)
    return (kind.__module__, kind.__name__) == ("numpy", "ndarray") and value.dtype.kind in NUMBERS


NUMBERS = "biufc"  # bool, int, unsigned, float, complex


def array(kind: str, shape: list, items: list):
    """An array of numbers. Raises TypeError for what may be more, such as one of objects."""
    import numpy

    if numpy.dtype(kind).kind not in NUMBERS:
        raise TypeError(f"an array of the type {kind!r}")
    return numpy.array(items, kind).reshape(shape)


@lru_cache
def array_for_tests() -> type:
    """The arrays of a program: tests may compare them with lists, as if the program had returned one."""
    import numpy

    class ndarray(numpy.ndarray):
        """Equal to a list if all is."""

        __module__ = "numpy"
        __hash__ = None

        def __eq__(self, other):
            return numpy.bool_(self.tolist() == other) if isinstance(other, list) else super().__eq__(other)

        def __ne__(self, other):
            return numpy.bool_(self.tolist() != other) if isinstance(other, list) else super().__ne__(other)

    return ndarray


def is_mutable(value) -> bool:
    """Whether it is data that a function can change in place."""
    return isinstance(value, (list, dict, set, bytearray)) or type(value).__name__ == "deque" or is_array(value)


def update(argument, now):
    """Makes an argument what a call has left it as: a function may sort it in place, or what is in it."""
    if isinstance(argument, list):
        argument[:] = [updated(old, new) for old, new in zip(argument, now, strict=False)] + now[len(argument) :]
    elif isinstance(argument, bytearray) or is_array(argument):
        argument[:] = now
    elif isinstance(argument, dict):
        now = {key: updated(argument.get(key), new) for key, new in now.items()}
        argument.clear()
        argument.update(now)
    elif isinstance(argument, set):
        argument.clear()
        argument.update(now)
    elif is_mutable(argument):
        argument.clear()
        argument.extend(now)


def updated(old, new):
    """`new`, but the same object as `old` where that can become equal to it: tests may have another name for it."""
    if type(old) is not type(new) or not is_mutable(new):
        return new
    update(old, new)
    return old


# ---------------------------------------------------------------- the program's end


def serve(source: str, channel: Channel):
    """Runs the program, then does what the tests ask for, for ever. Raises EOFError when they have ended."""
    module = sys.modules["solution"] = type(sys)("solution")
    printed = Printed()
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(printed), "utf-8", "surrogatepass")
    failure = None
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # perhaps of an example behind the functions, and the functions are there
        failure = error
    printed.take()

    def operate(operation, given, named):
        if operation == "getattr" and given[0] is module and failure and not hasattr(*given):
            raise failure
        return OPERATIONS[operation](*given, **named)

    end = End(channel, operate, remote_function, printed.take)
    end.share(module)
    while True:
        _, *request = channel.receive()
        end.answer(*request)


class Printed(io.RawIOBase):
    """A file that keeps the beginning of what is written to it."""

    def __init__(self):
        self.kept = b""

    def writable(self):
        return True

    def write(self, data):
        self.kept += bytes(data[: PRINTED - len(self.kept)])
        return len(data)

    def take(self) -> str:
        """What has been printed since the last call."""
        if hasattr(sys.stdout, "flush"):
            sys.stdout.flush()
        text = self.kept.decode("utf-8", "replace")
        self.kept = b""
        return text


def remote_function(end: End, place: int, name: str, is_iterator: bool):
    """A function or an iterator of the tests, as the program sees it."""

    def function(*given, **named):
        return end.ask("call", end.remotes[place], *given, **named)

    def iterator():
        while True:
            items, has_ended = end.ask("take", end.remotes[place], 1)
            yield from items
            if has_ended:
                return

    function.__name__ = function.__qualname__ = name or "function"
    return iterator() if is_iterator else function


def take(iterator, most: int) -> list:
    """The next items of an iterator, at most so many: [items, whether it has ended].

    It stops after 0.2 ms: the next item may be one that nobody will ask for, and that takes for ever. Raises what the
    iterator raises.
    """
    if error := FAILURES.pop(id(iterator), None):
        raise error
    start = time.perf_counter()
    items = []
    try:
        while len(items) < most:
            items.append(next(iterator))
            if time.perf_counter() - start > 2e-4:
                break
    except StopIteration:
        return [items, True]
    except Exception as error:
        if not items:
            raise
        FAILURES[id(iterator)] = error  # for the next time: the items before it come first
    return [items, False]


def plain(value):
    """The data in an object of a class that is derived from one of data, [data]; [] if it is no such object."""
    for base in (int, str, float, list, tuple, dict, set, frozenset):
        if isinstance(value, base):
            return [base(value)]
    return []


def copy(value, is_deep: bool):
    """A copy of an object, here in the process where it lives."""
    import copy

    return (copy.deepcopy if is_deep else copy.copy)(value)


FAILURES = {}  # id of an iterator → what its next item raises
BUILTINS = "bool float int str repr format hash len iter reversed round isinstance issubclass getattr setattr delattr"
OPERATIONS = {
    **{name: getattr(operator, name) for name in dir(operator) if name.startswith("__")},
    **{name: getattr(builtins, name) for name in BUILTINS.split()},
    "call": operator.call,
    "take": take,
    "plain": plain,
    "copy": copy,
}


# ---------------------------------------------------------------- the tests' end


class Remote:
    """What stands in the tests for an object of the program."""

    __slots__ = ("_remote_end", "_remote_makes_asked", "_remote_is_asked", "_remote_has_met_plain")

    def __init__(self, end: End, place: int, is_asked: bool = False):
        put = object.__setattr__
        put(self, "_remote_end", end)
        put(self, "_remote_makes_asked", False)  # a class that the tests name: its instances are asked what `in` means
        put(self, "_remote_is_asked", is_asked)
        put(self, "_remote_has_met_plain", False)  # the result of arithmetic with plain data

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__name__", "__dict__"):  # NumPy asks for arrays in our memory
            raise AttributeError(name)
        return self._remote_end.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._remote_end.ask("setattr", self, name, value)

    def __delattr__(self, name):
        self._remote_end.ask("delattr", self, name)

    def __call__(self, *given, **named):
        result = self._remote_end.ask("call", self, *given, **named)
        if self._remote_makes_asked and isinstance(result, Remote):
            object.__setattr__(result, "_remote_is_asked", True)
        return result

    def __eq__(self, other):
        if isinstance(other, Remote):
            return self is other or bool(self._remote_end.ask("__eq__", self, other))
        return any(data == other for data in plain_data(self))

    def __hash__(self):
        return self._remote_end.ask("hash", self)

    def __str__(self):
        return self._remote_end.ask("str", self)

    def __repr__(self):
        return self._remote_end.ask("repr", self)

    def __format__(self, form):
        return self._remote_end.ask("format", self, form)

    def __len__(self):
        return self._remote_end.ask("len", self)

    def __getitem__(self, key):
        return self._remote_end.ask("__getitem__", self, key)

    def __setitem__(self, key, value):
        self._remote_end.ask("__setitem__", self, key, value)

    def __delitem__(self, key):
        self._remote_end.ask("__delitem__", self, key)

    def __iter__(self):
        return self._remote_end.ask("iter", self)

    def __reversed__(self):
        return self._remote_end.ask("reversed", self)

    def __contains__(self, item):
        if self._remote_is_asked or isinstance(item, Remote):
            return self._remote_end.ask("__contains__", self, item)
        return any(item is found or item == found for found in self)

    def __instancecheck__(self, instance):
        return isinstance(instance, Remote) and self._remote_end.ask("isinstance", instance, self)

    def __subclasscheck__(self, kind):
        return isinstance(kind, Remote) and self._remote_end.ask("issubclass", kind, self)

    def __enter__(self):
        return self._remote_end.ask("call", self._remote_end.ask("getattr", self, "__enter__"))

    def __exit__(self, kind, error, traceback):
        return self._remote_end.ask("call", self._remote_end.ask("getattr", self, "__exit__"), kind, error, None)

    def __copy__(self):
        return self._remote_end.ask("copy", self, False)

    def __deepcopy__(self, memo):
        return self._remote_end.ask("copy", self, True)


class RemoteIterator(Remote):
    """An iterator of the program. It fetches more and more items at a time, but never many that nobody wants yet."""

    __slots__ = ("_remote_items", "_remote_most", "_remote_has_ended")

    def __init__(self, end: End, place: int):
        super().__init__(end, place)
        object.__setattr__(self, "_remote_items", [])
        object.__setattr__(self, "_remote_most", 1)
        object.__setattr__(self, "_remote_has_ended", False)

    def __iter__(self):
        return self

    def __next__(self):
        while not self._remote_items:
            if self._remote_has_ended:
                raise StopIteration
            items, has_ended = self._remote_end.ask("take", self, self._remote_most)
            object.__setattr__(self, "_remote_items", items[::-1])
            object.__setattr__(self, "_remote_has_ended", has_ended)
            object.__setattr__(self, "_remote_most", min(2 * self._remote_most, 1000))
        return self._remote_items.pop()


def remote_object(end: End, place: int, name: str, is_iterator: bool) -> Remote:
    """An object of the program, as the tests see it."""
    return RemoteIterator(end, place) if is_iterator else Remote(end, place)


def name_class(remote: Remote):
    """Says that it is a class that the tests name: its instances are asked what `in` means."""
    object.__setattr__(remote, "_remote_makes_asked", True)


def add_operators():
    """The operators of Remote, which are all alike."""

    def arithmetic(name, is_swapped):
        def method(self, other):
            for data in [] if isinstance(other, Remote) else plain_data(self):
                return getattr(operator, name)(*((other, data) if is_swapped else (data, other)))
            result = self._remote_end.ask(name, *((other, self) if is_swapped else (self, other)))
            return result if isinstance(other, Remote) else after_plain_data(result)

        return method

    def comparison(name):
        def method(self, other):
            if isinstance(other, Remote):
                return bool(self._remote_end.ask(name, self, other))
            for data in plain_data(self):
                return getattr(operator, name)(data, other)
            return NotImplemented

        return method

    def conversion(name, operation):
        def method(self, *given):
            result = self._remote_end.ask(operation, self, *given)
            return after_plain_data(result) if self._remote_has_met_plain else result

        return method

    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
        setattr(Remote, f"__{name}__", arithmetic(f"__{name}__", False))
        setattr(Remote, f"__r{name}__", arithmetic(f"__{name}__", True))
        setattr(Remote, f"__i{name}__", arithmetic(f"__i{name}__", False))
    for name in ("__lt__", "__le__", "__gt__", "__ge__"):
        setattr(Remote, name, comparison(name))
    for name in ("__neg__", "__pos__", "__invert__", "__abs__", "__index__"):
        setattr(Remote, name, conversion(name, name))
    for name in ("bool", "int", "float", "round"):
        setattr(Remote, f"__{name}__", conversion(f"__{name}__", name))


def plain_data(remote: Remote) -> list:
    """[the data] of an object that is data and more, for a comparison here; else []."""
    return [] if remote._remote_has_met_plain else remote._remote_end.ask("plain", remote)


def after_plain_data(result):
    """What an object of the program and plain data have made. Raises TypeError unless it is an object of it, too."""
    if not isinstance(result, Remote):
        raise TypeError("an object of the program cannot be computed with as if it were a number")
    object.__setattr__(result, "_remote_has_met_plain", True)
    return result


add_operators()


def operate_for_program(operation: str, given: list, named: dict):
    """What the program may ask of the tests: a call of a function that they gave to it, items of an iterator."""
    return {"call": operator.call, "take": take}[operation](*given, **named)
