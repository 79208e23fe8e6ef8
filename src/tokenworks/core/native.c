// What a forward pass over the few rows of a draft tree spends its time on, in float32.
//
// The product y = x w^T + b is bound by reading the weights, so they are laid out in the order they are read: in blocks of 16
// outputs, in a block one input after another. While one block is multiplied, the next is brought into the cache.
// Six rows share a block while it is in the registers; and since a sum is always formed in the order of the inputs,
// a row's result is the same bits whatever rows stand beside it.

#include <math.h>
#include <string.h>

enum { LANES = 8, OUTPUTS = 2 * LANES, ROWS = 6, PANEL = 48, LEVEL_2 = 2 };

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

// One block for up to 6 rows: y [rows, 16], its rows `stride` apart; meanwhile fetch what lies from `next` on, `step`
// floats for each input. `rows` is a constant where this is called, so that the sums stay in registers.
static inline __attribute__((always_inline)) void tile(
    const int rows, const float *x, long inputs, const float *w, const float *b, float *y, long stride,
    const float *next, long step)
{
    vector low[ROWS], high[ROWS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        low[row] = *(const vector *)b;
        high[row] = *(const vector *)(b + LANES);
    }
#pragma GCC unroll 2
    for (long i = 0; i < inputs; i++) {
        const vector first = *(const vector *)(w + i * OUTPUTS), second = *(const vector *)(w + i * OUTPUTS + LANES);
        __builtin_prefetch(next + i * step, 0, LEVEL_2);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            low[row] += x[row * inputs + i] * first;
            high[row] += x[row * inputs + i] * second;
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        *(vector *)(y + row * stride) = low[row];
        *(vector *)(y + row * stride + LANES) = high[row];
    }
}

// One block for up to 48 rows, shared out evenly over tiles, each of which fetches its share of the next block.
static void multiply_block(
    long rows, const float *x, long inputs, const float *w, const float *b, float *y, long stride)
{
    const long tiles = (rows + ROWS - 1) / ROWS, step = OUTPUTS / tiles;
    for (long t = 0; t < tiles; t++) {
        const long from = rows * t / tiles, to = rows * (t + 1) / tiles;
        const float *in = x + from * inputs, *next = w + inputs * OUTPUTS + t * inputs * step;
        float *out = y + from * stride;
        switch (to - from) {
            case 1: tile(1, in, inputs, w, b, out, stride, next, step); break;
            case 2: tile(2, in, inputs, w, b, out, stride, next, step); break;
            case 3: tile(3, in, inputs, w, b, out, stride, next, step); break;
            case 4: tile(4, in, inputs, w, b, out, stride, next, step); break;
            case 5: tile(5, in, inputs, w, b, out, stride, next, step); break;
            case 6: tile(6, in, inputs, w, b, out, stride, next, step); break;
        }
    }
}

// x [rows, inputs], w [blocks, inputs, 16], b [blocks * 16], y [rows, outputs].
void linear(const float *x, const float *w, const float *b, float *y, long rows, long inputs, long outputs)
{
    const long whole = outputs / OUTPUTS, rest = outputs % OUTPUTS;
    for (long from = 0; from < rows; from += PANEL) {  // a panel of x stays in the cache
        const long count = rows - from < PANEL ? rows - from : PANEL;
        const float *in = x + from * inputs;
        float *out = y + from * outputs;
#pragma omp parallel for schedule(static)
        for (long n = 0; n < whole; n++)
            multiply_block(count, in, inputs, w + n * inputs * OUTPUTS, b + n * OUTPUTS, out + n * OUTPUTS, outputs);
        if (rest) {
            float edge[PANEL * OUTPUTS];
            multiply_block(count, in, inputs, w + whole * inputs * OUTPUTS, b + whole * OUTPUTS, edge, OUTPUTS);
            for (long row = 0; row < count; row++)
                memcpy(out + row * outputs + whole * OUTPUTS, edge + row * OUTPUTS, rest * sizeof(float));
        }
    }
}

// y = x / sqrt(mean(x^2) + epsilon) * scale, row by row: x and y [rows, width], scale [width].
void rms_norm(const float *x, const float *scale, float *y, long rows, long width, float epsilon)
{
    for (long row = 0; row < rows; row++, x += width, y += width) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += x[i] * x[i];
        const float factor = 1 / sqrtf(sum / width + epsilon);
        for (long i = 0; i < width; i++) y[i] = x[i] * factor * scale[i];
    }
}
