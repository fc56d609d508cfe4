/* Subjects as bytes: what is valid, what matches. The rules are those of nats-server 2.15 (observed).
 *
 * A subject is tokens separated by '.'. In a subscription's pattern a token that is exactly "*" matches one token, and a
 * last token that is exactly ">" matches one or more; any other use of those bytes is literal. In a published subject
 * every byte is literal. Comparison is bytewise, case counts.
 */
#ifndef NSN_SUBJECT_H
#define NSN_SUBJECT_H

#include <stdbool.h>
#include <stddef.h>

#define NSN_SUBJECT_MAX 4096 /* bytes of a subject, a reply subject or a queue name */

/* True when the pattern can be subscribed: not empty, no empty token, nothing behind a ">" token. */
bool nsn_pattern_valid(const char *pattern, size_t length);

/* True when a published subject can match anything at all: not empty, no empty token. */
bool nsn_subject_routable(const char *subject, size_t length);

/* True when the pattern has a wildcard token. */
bool nsn_pattern_has_wildcard(const char *pattern, size_t length);

/* Bytes in front of a valid pattern's first wildcard token (its dot included): every subject it matches begins with them.
 * The whole length when there is no wildcard. */
size_t nsn_pattern_literal_prefix(const char *pattern, size_t length);

/* True when a valid pattern matches a routable subject. */
bool nsn_pattern_matches(const char *pattern, size_t pattern_length, const char *subject, size_t subject_length);

#endif
