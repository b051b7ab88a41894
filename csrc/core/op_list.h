// The op list: everything a backend must do, each argument with its shape. Each op is written down
// here once; ops.h, the backends and measure/proxy.h make their declarations of it.
//
//   M tokens of the current block · D model width · H heads · hd head dim · F tokens per latent
//   frame
//
// The same names are used by triton_kernels/, the reference in tests/ and the benchmarks. Rows may
// be fp32, bf16 or fp8; an op computes in fp32, reads what it is given and writes the format of its
// output (fp8 output: one scale per row, see liveact/dtype.h). All pointers are device pointers of
// the Device that the Ops came from. Arguments are checked when a stream opens.
//
// How to use it: define LIVEACT_OP(result, name, parameters, arguments), and LIVEACT_QUEUE_CALL of
// the same form where those are wanted too, then include this. Both are undefined again at the end.
//
// No `#pragma once`: it is included several times. No clang-format: it knows no such lists.
// clang-format off

#ifndef LIVEACT_QUEUE_CALL
#define LIVEACT_QUEUE_CALL(result, name, parameters, arguments)
#endif

// ---------------------------------------------------------------------------------------- latent

// Latent z [16, n, h, w] fp32 and conditioning y [c - 16, n, h, w] fp32 (frame stride given in latent
// frames of y: y has y_frames of them, the block starts at y_first) -> tokens [n * F, c * 4],
// channel-major patches (c, ph, pw).
LIVEACT_OP(void, patchify,
           (const float* z, const float* y, int64_t z_channels, int64_t y_channels, int64_t y_frames,
            int64_t y_first, int64_t n, int64_t h, int64_t w, const Rows& tokens),
           (z, y, z_channels, y_channels, y_frames, y_first, n, h, w, tokens))

// tokens [n * F, 4 * channels] in (ph, pw, channel) order -> v [channels, n, h, w] fp32.
LIVEACT_OP(void, unpatchify,
           (const Rows& tokens, int64_t channels, int64_t n, int64_t h, int64_t w, float* v),
           (tokens, channels, n, h, w, v))

// v <- v_null + guidance * (v - v_null), elementwise. v, v_null [size].
LIVEACT_OP(void, guide,
           (float* v, const float* v_null, float guidance, int64_t size),
           (v, v_null, guidance, size))

// x0 = z - sigma * v; z <- (1 - next_sigma) * x0 + next_sigma * noise. All [size] fp32; noise may be
// null where next_sigma is 0.
LIVEACT_OP(void, sampler_step,
           (float* z, const float* v, const float* noise, float sigma, float next_sigma, int64_t size),
           (z, v, noise, sigma, next_sigma, size))

// Returns whether every value of x [size] is finite. Waits for the ops before it.
LIVEACT_OP(bool, all_finite, (const float* x, int64_t size), (x, size))

// ------------------------------------------------------------------------------------------ rows

// out [M, N] = x [M, K] · weight [N, K]^T with the epilogue.
LIVEACT_OP(void, linear,
           (const Rows& x, const Weight& weight, const Epilogue& epilogue, const Rows& out),
           (x, weight, epilogue, out))

// out = LayerNorm(x) * gain + bias over the columns; modulate (gain = 1 + scale, bias = shift) and
// affine are the same op. gain, bias [cols] fp32.
LIVEACT_OP(void, layer_norm,
           (const Rows& x, const float* gain, const float* bias, float eps, const Rows& out),
           (x, gain, bias, eps, out))

// out = x / rms(x) * gain over all columns. gain [cols] fp32.
LIVEACT_OP(void, rms_norm,
           (const Rows& x, const float* gain, float eps, const Rows& out),
           (x, gain, eps, out))

// out = activation(x), quantised where out is fp8.
LIVEACT_OP(void, activate, (const Rows& x, Activation activation, const Rows& out),
           (x, activation, out))

// out = x in another format.
LIVEACT_OP(void, quantize, (const Rows& x, const Rows& out), (x, out))

// ------------------------------------------------------------------------------- keys and values

// scale [heads] of values [M, D], as described at kValueHeadroom.
LIVEACT_OP(void, value_scale, (const Rows& values, int64_t heads, float* scale),
           (values, heads, scale))

// From the fused product qkv [M, 3D]: RMS over all of D for q and k, rotation, split in heads,
// quantisation. Query and key of row t sit at latent-frame position first_position + t / F. Writes
// q [H, tokens, hd] and `current` (its scales are read): tokens first_token to first_token + M of
// them, which are all but where two devices share the rows.
LIVEACT_OP(void, split_qkv,
           (const Rows& qkv, const float* q_gain, const float* k_gain, float eps, const Rope& rope,
            int64_t first_position, int64_t first_token, const Heads& q, const KvSegment& current),
           (qkv, q_gain, k_gain, eps, rope, first_position, first_token, q, current))

// RMS-normed keys and values as they are of a text or an image, token-major k, v [tokens, D] ->
// segment.
LIVEACT_OP(void, store_kv, (const Rows& k, const Rows& v, const KvSegment& segment),
           (k, v, segment))

// context <- table applied to (context, current), `first_slot` being the slot (and position) of
// current's first latent frame. Keys are un-rotated, filtered, rotated for their new slot and rounded
// again; the scales of all three are the same. `staging` has the size of the context.
LIVEACT_OP(void, update_memory,
           (std::span<const SlotUpdate> table, const CompressFilter& filter, const Rope& rope,
            int64_t first_slot, const KvSegment& current, const KvSegment& staging,
            const KvSegment& context),
           (table, filter, rope, first_slot, current, staging, context))

// ------------------------------------------------------------------------------------- attention

// An `out` in fp8 has the scale described at kProbabilityScale, in every row.

// out [M, D] = softmax(q · [context; current]^T / sqrt(hd)) · [context; current], no mask.
// The context may have no tokens. out_scale [H]: fp8 output of fp8 attention only. Two devices: `out`
// has the columns of the heads of q, in rows of D, for as many tokens as it has rows; `rest` has those
// of the tokens after them. out_scale is of all heads.
LIVEACT_OP(void, self_attention,
           (const Heads& q, const KvSegment& context, const KvSegment& current,
            const float* out_scale, const Rows& out, const Rows& rest),
           (q, context, current, out_scale, out, rest))

// out [M, D] = Attn(q, text) + Attn(q, image): two softmaxes, one q [M, D]. The last text key stands
// for `pad_count` identical padding rows: its logit has log(pad_count) added; with pad_count 0 it is
// left out. fp8 output: the scale is that of text plus that of image.
LIVEACT_OP(void, cross_attention,
           (const Rows& q, const KvSegment& text, int64_t pad_count, const KvSegment& image,
            const Rows& out),
           (q, text, pad_count, image, out))

// Per latent frame j of n: out rows j*F .. = Attn(q rows j*F .., keys of that frame). kv holds
// kv_frames * T audio tokens [kv_frames * T, 2D] (k | v); kv_frames is n, or 1 for all alike.
// v_scale [heads] of their values: fp8 output only.
LIVEACT_OP(void, audio_attention,
           (const Rows& q, const Rows& kv, int64_t n, int64_t kv_frames, int64_t heads,
            const float* v_scale, const Rows& out),
           (q, kv, n, kv_frames, heads, v_scale, out))

// ------------------------------------------------------------------------ calls around the ops

// A barrier between the queues of two devices, in two halves. `signal` says that the ops before it are
// done and what they wrote is to be seen on both devices; the ops after `wait` come after as many
// signals of the other queue as this queue has waited. Who drives both queues has both signal before
// either waits. `idle` is whether all ops are done; it fails where one of them did, and never waits.
LIVEACT_QUEUE_CALL(void, signal, (const Barrier& barrier), (barrier))
LIVEACT_QUEUE_CALL(void, wait, (const Barrier& barrier), (barrier))
LIVEACT_QUEUE_CALL(bool, idle, (), ())

// The keys of `segment` un-rotated, and its values, as fp32 [tokens, H, hd]; for inspection.
LIVEACT_QUEUE_CALL(void, export_kv,
                   (const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                    float* v),
                   (segment, rope, first_position, k, v))

// Planning: from `begin_plan` to `end_plan` ops check their arguments and note their shapes, and
// nothing runs; `end_plan` then chooses what is to be chosen for these shapes, by trial where that is
// the way, which overwrites what the noted ops write. Nothing happens and false comes back where there
// is nothing to choose.
LIVEACT_QUEUE_CALL(bool, begin_plan, (), ())
LIVEACT_QUEUE_CALL(void, end_plan, (), ())

// Held while a part is put on the queues of two devices that wait for one another; null where an op is
// done when it returns. So the queues of all devices have the parts of all streams in one order, and
// no memory is freed in between, which would wait for a device that waits for another.
LIVEACT_QUEUE_CALL(std::recursive_mutex*, turn, (), ())

// Repeating the same ops on the same buffers: `replay(key)` runs what was recorded under `key` and
// returns true, or returns false. Then the ops between `begin_record` and `end_record` run, unless the
// backend records them (CUDA graphs) for the `replay` that has to follow. `forget` drops all, one that
// is being recorded too.
LIVEACT_QUEUE_CALL(bool, replay, (int key), (key))
LIVEACT_QUEUE_CALL(void, begin_record, (int key), (key))
LIVEACT_QUEUE_CALL(void, end_record, (), ())
LIVEACT_QUEUE_CALL(void, forget, (), ())

// Time marks 0 to kTimeMarks - 1. `mark` notes when the ops before it are done, without waiting;
// `marked_ms` is the time between two marks once a `download` after the later one has returned.
LIVEACT_QUEUE_CALL(void, mark, (int index), (index))
LIVEACT_QUEUE_CALL(double, marked_ms, (int first, int second), (first, second))

// Host memory in and out; `download` waits for the ops before it.
LIVEACT_QUEUE_CALL(void, upload, (void* target, const void* host, int64_t bytes),
                   (target, host, bytes))
LIVEACT_QUEUE_CALL(void, download, (void* host, const void* source, int64_t bytes),
                   (host, source, bytes))

// clang-format on
#undef LIVEACT_OP
#undef LIVEACT_QUEUE_CALL
