/* What the fuzz targets share: the input as a stream of numbers and bytes, which says what is done and with what. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *at, *end;
};

/* Zeros behind the end. */
static inline uint64_t take(struct input *input, size_t bytes)
{
    uint64_t value = 0;
    size_t left = (size_t)(input->end - input->at), length = bytes < left ? bytes : left;
    memcpy(&value, input->at, length);
    input->at += length;
    return value;
}

static inline uint8_t take8(struct input *input) { return (uint8_t)take(input, 1); }
static inline uint16_t take16(struct input *input) { return (uint16_t)take(input, 2); }
static inline uint64_t take64(struct input *input) { return take(input, 8); }

/* Up to `most` bytes of the input; *length is how many there were. */
static inline const uint8_t *take_bytes(struct input *input, size_t most, size_t *length)
{
    const uint8_t *bytes = input->at;
    size_t left = (size_t)(input->end - input->at);
    *length = most < left ? most : left;
    input->at += *length;
    return bytes;
}

/* What must hold: a failure is a crash, which the fuzzer keeps. */
#define MUST(condition)                                                                                                     \
    do {                                                                                                                    \
        if (!(condition)) {                                                                                                 \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                       \
            abort();                                                                                                        \
        }                                                                                                                   \
    } while (0)

/* A directory on tmpfs that whoever runs the target cleans up. */
static inline const char *fuzz_directory(void)
{
    const char *given = getenv("NSN_FUZZ_DIRECTORY");
    return given ? given : ".";
}

/* Every byte can be read. */
static inline void read_all(const void *bytes, size_t length)
{
    uint8_t all = 0;
    for (size_t i = 0; i < length; i++)
        all ^= ((const uint8_t *)bytes)[i];
    __asm__ volatile("" ::"r"(all)); /* it is used */
}

#endif
