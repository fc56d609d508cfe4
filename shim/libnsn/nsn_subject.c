/* Subjects as bytes: validity and matching, as nats-server 2.15 does both. */
#include "nsn_subject.h"

#include <string.h>

static size_t token_length(const char *bytes, size_t length)
{
    const char *dot = memchr(bytes, '.', length);
    return dot ? (size_t)(dot - bytes) : length;
}

static bool is_token(const char *token, size_t length, char wildcard) { return length == 1 && token[0] == wildcard; }

bool nsn_pattern_valid(const char *pattern, size_t length)
{
    size_t position = 0;
    for (;;) {
        size_t token = token_length(pattern + position, length - position);
        if (!token)
            return false;
        bool last = position + token == length;
        if (last)
            return true;
        if (is_token(pattern + position, token, '>'))
            return false;
        position += token + 1;
    }
}

bool nsn_subject_routable(const char *subject, size_t length)
{
    if (!length || subject[0] == '.' || subject[length - 1] == '.')
        return false;
    for (size_t i = 1; i < length; i++)
        if (subject[i] == '.' && subject[i - 1] == '.')
            return false;
    return true;
}

bool nsn_pattern_has_wildcard(const char *pattern, size_t length)
{
    return nsn_pattern_literal_prefix(pattern, length) < length;
}

size_t nsn_pattern_literal_prefix(const char *pattern, size_t length)
{
    size_t position = 0;
    while (position < length) {
        size_t token = token_length(pattern + position, length - position);
        if (is_token(pattern + position, token, '*'))
            return position;
        if (is_token(pattern + position, token, '>') && position + token == length)
            return position;
        position += token + 1;
    }
    return length;
}

bool nsn_pattern_matches(const char *pattern, size_t pattern_length, const char *subject, size_t subject_length)
{
    size_t p = 0, s = 0;
    for (;;) {
        size_t want = token_length(pattern + p, pattern_length - p), have = token_length(subject + s, subject_length - s);
        if (!have)
            return false;
        bool pattern_ends = p + want == pattern_length, subject_ends = s + have == subject_length;
        if (pattern_ends && is_token(pattern + p, want, '>'))
            return true;
        if (!is_token(pattern + p, want, '*') && (want != have || memcmp(pattern + p, subject + s, want) != 0))
            return false;
        if (pattern_ends || subject_ends)
            return pattern_ends && subject_ends;
        p += want + 1;
        s += have + 1;
    }
}
