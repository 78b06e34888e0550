"""Vector primitives for the CPU kernels, as numba intrinsics over raw addresses. Knows registers; knows no attention.

Numba has no vector type, and leaves it to LLVM's heuristics whether a loop keeps its accumulators in registers. These
intrinsics emit vectors of 16 float32 lanes themselves; LLVM splits them where the machine's registers are narrower
(AVX2, NEON). Each of them does, for every element, one fixed sequence of correctly rounded operations that does not
depend on how many rows or columns are asked for: that is what makes the kernels built on them batch-invariant.

Numba's cache on disk watches the file of the compiled function, which is cpu.py: after a change here, touch that one.

Element types in memory (``DTYPE_CODES``): float32, bfloat16, float16; arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(_F32, LANES)
_IVEC = ir.VectorType(_I32, LANES)


def _prefetch(builder: Any, pointer: Any) -> None:
    """For reading, into every cache level."""
    arguments = [builder.bitcast(pointer, ir.IntType(8).as_pointer())] + [ir.Constant(_I32, x) for x in (0, 3, 1)]
    function_type = ir.FunctionType(ir.VoidType(), [x.type for x in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0"), arguments)


def _splat_const(value: float) -> ir.Constant:
    return ir.Constant(_VEC, [ir.Constant(_F32, value)] * LANES)


def _splat(builder: Any, scalar: Any, vector_type: Any = _VEC) -> Any:
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [ir.Constant(_I32, 0)] * LANES)
    return builder.shuffle_vector(first, undefined, zeros)


def _sum_lanes(builder: Any, vector: Any) -> Any:
    """The sum of the 16 lanes as a tree of fixed shape: halves are added to halves, four times."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = [i + width if i < width else i for i in range(LANES)]
        mask = ir.Constant(ir.VectorType(_I32, LANES), [ir.Constant(_I32, i) for i in lanes])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, ir.Constant(_VEC, ir.Undefined), mask))
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in arguments]), name
    )
    return builder.call(function, arguments)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _VEC, a, b, c)


def _pointer(builder: Any, address: Any, element: Any, index: Any) -> Any:
    """Pointer to element ``index`` of an array at ``address``; base and index apart, or LLVM would not vectorize."""
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index], source_etype=element)


def _load_vec(builder: Any, address: Any, index: Any, dtype: int) -> Any:
    """16 elements from ``index`` on, widened to float32."""
    if dtype == 0:
        pointer = builder.bitcast(_pointer(builder, address, _F32, index), _VEC.as_pointer())
        return builder.load(pointer, align=4)
    bits_type = ir.VectorType(ir.IntType(16), LANES)
    pointer = builder.bitcast(_pointer(builder, address, ir.IntType(16), index), bits_type.as_pointer())
    bits = builder.load(pointer, align=2)
    if dtype == 1:  # bfloat16 is the upper half of a float32
        wide = builder.shl(builder.zext(bits, _IVEC), ir.Constant(_IVEC, [ir.Constant(_I32, 16)] * LANES))
        return builder.bitcast(wide, _VEC)
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), _VEC)


def _store_vec(builder: Any, value: Any, address: Any, index: Any, dtype: int = 0) -> None:
    """16 float32 to elements of ``dtype``, rounded to nearest even."""
    if dtype == 0:
        pointer = builder.bitcast(_pointer(builder, address, _F32, index), _VEC.as_pointer())
        builder.store(value, pointer, align=4)
        return
    half = ir.VectorType(ir.IntType(16), LANES)
    pointer = builder.bitcast(_pointer(builder, address, ir.IntType(16), index), half.as_pointer())
    if dtype == 1:
        bits = _round_to_bfloat16(
            builder, value, _IVEC, lambda number: ir.Constant(_IVEC, [ir.Constant(_I32, number)] * 16)
        )
        builder.store(builder.trunc(bits, half), pointer, align=2)
    else:
        halves = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
        builder.store(builder.bitcast(halves, half), pointer, align=2)


def _round_to_bfloat16(builder: Any, value: Any, integers: Any, constant: Any) -> Any:
    """float32 (scalar or vector) -> the bits of the nearest bfloat16, ties to even, in the low half of an integer."""
    bits = builder.bitcast(value, integers)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.lshr(builder.select(is_nan, constant(0x7FC00000), rounded), constant(16))


def _literals(*arguments: Any) -> tuple[int, ...] | None:
    if all(isinstance(a, types.IntegerLiteral) for a in arguments):
        return tuple(a.literal_value for a in arguments)
    return None


@intrinsic(prefer_literal=True)
def gemm_tile(typingctx, a, lda, b, ldb, c, ldc, depth, ahead, rows, vectors, b_dtype, accumulate):  # type: ignore[no-untyped-def]
    """C[rows, 16 * vectors] (+)= A[rows, depth] @ B[depth, 16 * vectors]; A, C float32, B of ``b_dtype``.

    Addresses a, b, c and leading dimensions (in elements) are int64; ``rows``, ``vectors``, ``b_dtype`` and
    ``accumulate`` are literals. Each element of C is one chain of fused multiply-adds over depth = 0, 1, 2, ...,
    whatever the tile: rows * vectors chains run side by side in registers. ``accumulate`` 0: the chain starts from 0;
    1: from C; 2: from 0, and is added to C.

    While it works on a row of B it prefetches what lies ``ahead`` bytes further on: the block that comes next, which
    no hardware prefetcher can guess from a block table.
    """
    constants = _literals(rows, vectors, b_dtype, accumulate)
    if constants is None:
        return None
    num_rows, num_vectors, dtype, accumulates = constants
    signature = types.void(*([types.int64] * 8), rows, vectors, b_dtype, accumulate)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a_, lda_, b_, ldb_, c_, ldc_, depth_, ahead_ = args[:8]
        cell = [(r, v) for r in range(num_rows) for v in range(num_vectors)]
        c_index = {
            (r, v): builder.add(builder.mul(ldc_, ir.Constant(_I64, r)), ir.Constant(_I64, v * LANES)) for r, v in cell
        }
        start = [_load_vec(builder, c_, c_index[rv], 0) if accumulates == 1 else _splat_const(0.0) for rv in cell]
        before = builder.block
        loop, after = builder.append_basic_block("gemm.loop"), builder.append_basic_block("gemm.after")
        builder.cbranch(builder.icmp_signed(">", depth_, ir.Constant(_I64, 0)), loop, after)

        builder.position_at_end(loop)
        k = builder.phi(_I64)
        k.add_incoming(ir.Constant(_I64, 0), before)
        sums = [builder.phi(_VEC) for _ in cell]
        for phi, value in zip(sums, start, strict=True):
            phi.add_incoming(value, before)
        b_row = builder.mul(k, ldb_)
        b_vec = [
            _load_vec(builder, b_, builder.add(b_row, ir.Constant(_I64, v * LANES)), dtype) for v in range(num_vectors)
        ]
        element = _F32 if dtype == 0 else ir.IntType(16)
        for v in range(0, num_vectors, 1 if dtype == 0 else 2):  # one cache line of 64 bytes each
            index = builder.add(b_row, ir.Constant(_I64, v * LANES))
            _prefetch(builder, _pointer(builder, builder.add(b_, ahead_), element, index))
        new = []
        for r in range(num_rows):
            index = builder.add(builder.mul(lda_, ir.Constant(_I64, r)), k)
            a_vec = _splat(builder, builder.load(_pointer(builder, a_, _F32, index), align=4))
            new += [_fma(builder, a_vec, b_vec[v], sums[r * num_vectors + v]) for v in range(num_vectors)]
        next_k = builder.add(k, ir.Constant(_I64, 1))
        k.add_incoming(next_k, loop)
        for phi, value in zip(sums, new, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", next_k, depth_), loop, after)

        builder.position_at_end(after)
        for rv, value, result in zip(cell, start, new, strict=True):
            phi = builder.phi(_VEC)
            phi.add_incoming(value, before)
            phi.add_incoming(result, loop)
            c_index[rv] = (c_index[rv], phi)
        for rv in cell:
            index, total = c_index[rv]
            if accumulates == 2:
                total = builder.fadd(_load_vec(builder, c_, index, 0), total)
            _store_vec(builder, total, c_, index)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def gemm_pairs(typingctx, a, lda, b, ldb, c, ldc, num_tiles, ahead, rows, vectors):  # type: ignore[no-untyped-def]
    """C[rows, 16 * vectors] = A[rows, depth] @ B for a bfloat16 B in pairs of rows; depth = 32 * num_tiles >= 32.

    A and C are float32. B[k // 2] is a row of ``ldb`` 32-bit words, one for each column: element k in the low half,
    k + 1 in the high half (Intel calls it VNNI layout). For each tile of 16 pairs, the products of even k and those of
    odd k are two chains of fused multiply-adds that start from 0; then the element becomes its old value + (even +
    odd). That is, bit for bit, what a TDPBF16PS instruction of AMX does with each tile (Intel SDM, volume 2), but for
    denormal numbers, which that instruction takes for 0.
    """
    constants = _literals(rows, vectors)
    if constants is None:
        return None
    num_rows, num_vectors = constants
    signature = types.void(*([types.int64] * 8), rows, vectors)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a_, lda_, b_, ldb_, c_, ldc_, tiles_, ahead_ = args[:8]
        cells = [(r, v) for r in range(num_rows) for v in range(num_vectors)]
        zero, one, two = (ir.Constant(_I64, x) for x in (0, 1, 2))
        before = builder.block
        outer, inner = builder.append_basic_block("tiles.loop"), builder.append_basic_block("pairs.loop")
        done, after = builder.append_basic_block("pairs.done"), builder.append_basic_block("tiles.after")
        builder.branch(outer)

        builder.position_at_end(outer)
        tile = builder.phi(_I64)
        tile.add_incoming(zero, before)
        totals = {cell: builder.phi(_VEC) for cell in cells}
        for phi in totals.values():
            phi.add_incoming(_splat_const(0.0), before)
        first = builder.mul(tile, ir.Constant(_I64, 16))
        builder.branch(inner)

        builder.position_at_end(inner)
        step = builder.phi(_I64)
        step.add_incoming(zero, outer)
        sums = {(cell, odd): builder.phi(_VEC) for cell in cells for odd in (0, 1)}
        for phi in sums.values():
            phi.add_incoming(_splat_const(0.0), outer)
        pair = builder.add(first, step)
        row = builder.mul(pair, ldb_)
        halves = {}
        for v in range(num_vectors):
            index = builder.add(row, ir.Constant(_I64, v * LANES))
            words = builder.load(builder.bitcast(_pointer(builder, b_, _I32, index), _IVEC.as_pointer()), align=4)
            low = builder.shl(words, ir.Constant(_IVEC, [ir.Constant(_I32, 16)] * LANES))
            high = builder.and_(words, ir.Constant(_IVEC, [ir.Constant(_I32, 0xFFFF0000)] * LANES))
            halves[v, 0], halves[v, 1] = builder.bitcast(low, _VEC), builder.bitcast(high, _VEC)
            _prefetch(builder, _pointer(builder, builder.add(b_, ahead_), _I32, index))
        new = {}
        for r in range(num_rows):
            for odd in (0, 1):
                index = builder.add(builder.mul(lda_, ir.Constant(_I64, r)), builder.mul(pair, two))
                index = builder.add(index, ir.Constant(_I64, odd))
                a_vec = _splat(builder, builder.load(_pointer(builder, a_, _F32, index), align=4))
                for v in range(num_vectors):
                    new[(r, v), odd] = _fma(builder, a_vec, halves[v, odd], sums[(r, v), odd])
        next_step = builder.add(step, one)
        step.add_incoming(next_step, inner)
        for key, phi in sums.items():
            phi.add_incoming(new[key], inner)
        builder.cbranch(builder.icmp_signed("<", next_step, ir.Constant(_I64, 16)), inner, done)

        builder.position_at_end(done)
        next_tile = builder.add(tile, one)
        tile.add_incoming(next_tile, done)
        results = {}
        for cell, phi in totals.items():
            results[cell] = builder.fadd(phi, builder.fadd(new[cell, 0], new[cell, 1]))
            phi.add_incoming(results[cell], done)
        builder.cbranch(builder.icmp_signed("<", next_tile, tiles_), outer, after)

        builder.position_at_end(after)
        for (r, v), result in results.items():
            index = builder.add(builder.mul(ldc_, ir.Constant(_I64, r)), ir.Constant(_I64, v * LANES))
            _store_vec(builder, result, c_, index)
        return context.get_dummy_value()

    return signature, codegen


def _loop_over_vectors(builder: Any, num_vectors: Any, start: Any, body: Any) -> Any:
    """Folds ``body(index of the first element, accumulator) -> accumulator`` over ``num_vectors`` >= 1 vectors."""
    before = builder.block
    loop, after = builder.append_basic_block("vectors.loop"), builder.append_basic_block("vectors.after")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_I64)
    i.add_incoming(ir.Constant(_I64, 0), before)
    accumulator = builder.phi(_VEC)
    accumulator.add_incoming(start, before)
    result = body(builder.mul(i, ir.Constant(_I64, LANES)), accumulator)
    next_i = builder.add(i, ir.Constant(_I64, 1))
    i.add_incoming(next_i, builder.block)
    accumulator.add_incoming(result, builder.block)
    builder.cbranch(builder.icmp_signed("<", next_i, num_vectors), loop, after)
    builder.position_at_end(after)
    return result


@intrinsic
def vector_max(typingctx, address, num_vectors):  # type: ignore[no-untyped-def]
    """Largest of 16 * num_vectors float32; num_vectors >= 1. NaN counts as absent."""
    signature = types.float32(types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address_, num_ = args

        def body(index: Any, best: Any) -> Any:
            value = _load_vec(builder, address_, index, 0)
            return builder.select(builder.fcmp_ordered(">", value, best), value, best)

        best = _loop_over_vectors(builder, num_, _splat_const(float("-inf")), body)
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", _F32, best)

    return signature, codegen


@intrinsic
def vector_exp_sum(typingctx, address, num_vectors, shift):  # type: ignore[no-untyped-def]
    """x := exp(x - shift) in place over 16 * num_vectors float32; returns their sum.

    The sum is kept in 16 lanes (lane = index % 16) that are added in a fixed tree, so that appending zeros does not
    change its bits. exp: Cody-Waite reduction and a polynomial of degree 6 (coefficients of Cephes' expf, S. Moshier);
    relative error below 2e-7; below -87 it is exactly 0, above 88 it stays at exp(88), NaN stays NaN.
    """
    signature = types.float32(types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address_, num_, shift_ = args
        shift_vec = _splat(builder, shift_)

        def body(index: Any, total: Any) -> Any:
            x = builder.fsub(_load_vec(builder, address_, index, 0), shift_vec)
            y = _exp(builder, x)
            _store_vec(builder, y, address_, index)
            return builder.fadd(total, y)

        total = _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return _sum_lanes(builder, total)

    return signature, codegen


def _exp(builder: Any, x: Any) -> Any:
    tiny = builder.fcmp_ordered("<", x, _splat_const(-87.0))
    x = builder.select(tiny, _splat_const(0.0), x)
    # A comparison, not minnum: NaN must stay NaN (minnum would make it 88, and a poisoned score a large finite weight).
    x = builder.select(builder.fcmp_ordered(">", x, _splat_const(88.0)), _splat_const(88.0), x)
    n = _call(builder, "llvm.rint.v16f32", _VEC, builder.fmul(x, _splat_const(1.4426950408889634)))
    minus_n = builder.fneg(n)
    r = _fma(builder, minus_n, _splat_const(0.693359375), x)
    r = _fma(builder, minus_n, _splat_const(-2.12194440e-4), r)
    p = _splat_const(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = _fma(builder, p, r, _splat_const(coefficient))
    exponent = builder.add(builder.fptosi(n, _IVEC), ir.Constant(_IVEC, [ir.Constant(_I32, 127)] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(_IVEC, [ir.Constant(_I32, 23)] * LANES)), _VEC)
    return builder.select(tiny, _splat_const(0.0), builder.fmul(p, power))


@intrinsic
def vector_scale(typingctx, address, num_vectors, factor):  # type: ignore[no-untyped-def]
    """x := x * factor in place over 16 * num_vectors float32; num_vectors >= 1."""
    signature = types.void(types.int64, types.int64, types.float32)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address_, num_, factor_ = args
        factor_vec = _splat(builder, factor_)

        def body(index: Any, unused: Any) -> Any:
            _store_vec(builder, builder.fmul(_load_vec(builder, address_, index, 0), factor_vec), address_, index)
            return unused

        _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def vector_silu_mul(typingctx, gate, up, out, num_vectors, dtype):  # type: ignore[no-untyped-def]
    """out := gate / (1 + exp(-gate)) * up over 16 * num_vectors elements of ``dtype``; num_vectors >= 1."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        gate_, up_, out_, num_ = args[:4]

        def body(index: Any, unused: Any) -> Any:
            g = _load_vec(builder, gate_, index, constants[0])
            u = _load_vec(builder, up_, index, constants[0])
            e = _exp(builder, builder.fneg(g))
            y = builder.fmul(builder.fdiv(g, builder.fadd(_splat_const(1.0), e)), u)
            _store_vec(builder, y, out_, index, constants[0])
            return unused

        _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, dtype), codegen


@intrinsic(prefer_literal=True)
def vector_add(typingctx, x, y, num_vectors, dtype):  # type: ignore[no-untyped-def]
    """y := y + x over 16 * num_vectors elements of ``dtype``; num_vectors >= 1."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, y_, num_ = args[:3]

        def body(index: Any, unused: Any) -> Any:
            total = builder.fadd(
                _load_vec(builder, y_, index, constants[0]), _load_vec(builder, x_, index, constants[0])
            )
            _store_vec(builder, total, y_, index, constants[0])
            return unused

        _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, dtype), codegen


@intrinsic(prefer_literal=True)
def vector_add_bias(typingctx, x, bias, out, num_vectors, dtype):  # type: ignore[no-untyped-def]
    """out := x + bias over 16 * num_vectors elements; x float32, bias and out of ``dtype``; no bias if it is 0."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, bias_, out_, num_ = args[:4]
        has_bias = builder.icmp_signed("!=", bias_, ir.Constant(_I64, 0))
        # Without a bias the loads below are made from x itself, and not used.
        source = builder.select(has_bias, bias_, x_)

        def body(index: Any, unused: Any) -> Any:
            value = _load_vec(builder, x_, index, 0)
            total = builder.fadd(value, _load_vec(builder, source, index, constants[0]))
            _store_vec(builder, builder.select(has_bias, total, value), out_, index, constants[0])
            return unused

        _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, dtype), codegen


@intrinsic(prefer_literal=True)
def vector_square_sum(typingctx, x, num_vectors, dtype):  # type: ignore[no-untyped-def]
    """Sum of x * x over 16 * num_vectors elements of ``dtype``, in 16 lanes that are added in a fixed tree."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, num_ = args[:2]

        def body(index: Any, total: Any) -> Any:
            value = _load_vec(builder, x_, index, constants[0])
            return _fma(builder, value, value, total)

        total = _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return _sum_lanes(builder, total)

    return types.float32(types.int64, types.int64, dtype), codegen


@intrinsic(prefer_literal=True)
def vector_norm(typingctx, x, weight, out, num_vectors, factor, dtype):  # type: ignore[no-untyped-def]
    """out := x * factor * weight over 16 * num_vectors elements of ``dtype``; out may be x."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, weight_, out_, num_, factor_ = args[:5]
        factor_vec = _splat(builder, factor_)

        def body(index: Any, unused: Any) -> Any:
            scaled = builder.fmul(_load_vec(builder, x_, index, constants[0]), factor_vec)
            scaled = builder.fmul(scaled, _load_vec(builder, weight_, index, constants[0]))
            _store_vec(builder, scaled, out_, index, constants[0])
            return unused

        _loop_over_vectors(builder, num_, _splat_const(0.0), body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32, dtype), codegen


@intrinsic(prefer_literal=True)
def vector_rope(typingctx, x, cos, sin, out, half, dtype, out_dtype):  # type: ignore[no-untyped-def]
    """out[i] := x[i] cos[i] - x[half + i] sin[i]; out[half + i] := x[half + i] cos[i] + x[i] sin[i].

    ``half`` elements, a multiple of 16; cos and sin are float32, x of ``dtype``, out of ``out_dtype``.
    """
    constants = _literals(dtype, out_dtype)
    if constants is None:
        return None
    source, target = constants

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, cos_, sin_, out_, half_ = args[:5]

        def body(index: Any, unused: Any) -> Any:
            upper = builder.add(index, half_)
            a, b = _load_vec(builder, x_, index, source), _load_vec(builder, x_, upper, source)
            c, s = _load_vec(builder, cos_, index, 0), _load_vec(builder, sin_, index, 0)
            first = _fma(builder, a, c, builder.fneg(builder.fmul(b, s)))
            second = _fma(builder, b, c, builder.fmul(a, s))
            _store_vec(builder, first, out_, index, target)
            _store_vec(builder, second, out_, upper, target)
            return unused

        _loop_over_vectors(builder, builder.lshr(half_, ir.Constant(_I64, 4)), _splat_const(0.0), body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64, dtype, out_dtype), codegen


@intrinsic(prefer_literal=True)
def load(typingctx, address, index, dtype):  # type: ignore[no-untyped-def]
    """Element ``index`` of an array of ``dtype`` (literal code) at ``address``, as float32."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address_, index_ = args[:2]
        if constants[0] == 0:
            return builder.load(_pointer(builder, address_, _F32, index_), align=4)
        bits = builder.load(_pointer(builder, address_, ir.IntType(16), index_), align=2)
        if constants[0] == 1:
            return builder.bitcast(builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16)), _F32)
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32)

    return types.float32(types.int64, types.int64, dtype), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, value, address, index, dtype):  # type: ignore[no-untyped-def]
    """Stores a float32 as element ``index`` of an array of ``dtype`` (literal code), rounded to nearest even."""
    constants = _literals(dtype)
    if constants is None:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value_, address_, index_ = args[:3]
        if constants[0] == 0:
            builder.store(value_, _pointer(builder, address_, _F32, index_), align=4)
            return context.get_dummy_value()
        if constants[0] == 1:
            rounded = _round_to_bfloat16(builder, value_, _I32, lambda number: ir.Constant(_I32, number))
            half = builder.trunc(rounded, ir.IntType(16))
        else:
            half = builder.bitcast(builder.fptrunc(value_, ir.HalfType()), ir.IntType(16))
        builder.store(half, _pointer(builder, address_, ir.IntType(16), index_), align=2)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64, types.int64, dtype), codegen


@intrinsic
def load_i32(typingctx, address, index):  # type: ignore[no-untyped-def]
    """Element ``index`` of an int32 array at ``address``, as int64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sext(builder.load(_pointer(builder, args[0], _I32, args[1]), align=4), _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_i64(typingctx, address, index):  # type: ignore[no-untyped-def]
    """Element ``index`` of an int64 array at ``address``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.add(args[0], builder.mul(args[1], ir.Constant(_I64, 8)))
        return builder.load(builder.inttoptr(offset, _I64.as_pointer()), align=8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def as_float(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 in the low half of an int64 (how `openmp.run` passes scalars)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _I32), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def atomic_next(typingctx, address):  # type: ignore[no-untyped-def]
    """Adds 1 to the int64 at ``address`` and returns what it was: how threads share out work items."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), codegen
