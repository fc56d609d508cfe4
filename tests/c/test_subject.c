/* Validity and matching of subjects: the tables of what nats-server 2.15 does. */
#include "check.h"
#include "nsn_subject.h"

static bool valid(const char *pattern) { return nsn_pattern_valid(pattern, strlen(pattern)); }
static bool routable(const char *subject) { return nsn_subject_routable(subject, strlen(subject)); }
static bool matches(const char *pattern, const char *subject)
{
    return routable(subject) && nsn_pattern_matches(pattern, strlen(pattern), subject, strlen(subject));
}

TEST(pattern_with_an_empty_token_or_something_behind_the_tail_is_invalid)
{
    const char *invalid[] = {"", ".", "..", "foo.", ".foo", "foo..bar", "foo.>.bar", ">.foo", ">.>", ">.", "*.", ".*", ".>"};
    for (size_t i = 0; i < sizeof(invalid) / sizeof(*invalid); i++)
        CHECK(!valid(invalid[i]));
}

TEST(pattern_of_whole_tokens_or_with_literal_wildcard_bytes_is_valid)
{
    const char *accepted[] = {">", "*", "foo.*", "foo.*.bar", "foo.>", "fo*", "*foo", "foo*.bar", "foo.**", "foo>", ">foo",
                              "foo.>>", "$SYS.>", "_INBOX.>", "FOO", ">>.foo", "f>.foo", "*.*", "a b", "\x01\xff"};
    for (size_t i = 0; i < sizeof(accepted) / sizeof(*accepted); i++)
        CHECK(valid(accepted[i]));
    CHECK(nsn_pattern_valid("a\0b", 3));
}

TEST(subject_with_an_empty_token_is_not_routable)
{
    const char *unroutable[] = {"", ".", "..", "foo.", "foo..", "foo..bar", ".foo", ".foo.", "a.b..c"};
    for (size_t i = 0; i < sizeof(unroutable) / sizeof(*unroutable); i++) {
        CHECK(!routable(unroutable[i]));
        CHECK(!matches(">", unroutable[i]));
    }
    CHECK(routable("foo") && routable("a.b.c") && routable("foo.>.baz") && routable("*") && routable(">"));
}

TEST(matching_is_that_of_the_reference_table)
{
    const char *patterns[] = {"foo",     "foo.*", "foo.>", "*",   "*.*",    ">",      "fo*", "foo.*.baz",
                              "foo.b*", "*.>",   ">x",    "FOO", "foo.**", "foo.>>", "*foo"};
    const struct { const char *subject, *row; } table[] = {
        {"foo", "1..1.1........."},         {"foo.bar", ".11.11...1....."}, {"foo.bar.baz", "..1..1.1.1....."},
        {"fo*", "...1.11........"},         {"foo.b*", ".11.11..11....."},  {"foo.", "..............."},
        {"foo..", "..............."},       {"foo..bar", "..............."}, {".foo", "..............."},
        {".", "..............."},           {"foo.*", ".11.11...1....."},   {"foo.>", ".11.11...1....."},
        {"*", "...1.1........."},           {">", "...1.1........."},       {"foo.>.baz", "..1..1.1.1....."},
        {"FOO", "...1.1.....1..."},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(*table); i++)
        for (size_t j = 0; j < 15; j++)
            if (matches(patterns[j], table[i].subject) != (table[i].row[j] == '1')) {
                fprintf(stderr, "subscription %s, subject %s: expected %c\n", patterns[j], table[i].subject, table[i].row[j]);
                exit(1);
            }
}

TEST(literal_use_of_wildcard_bytes_matches_itself_alone)
{
    CHECK(matches(">x", ">x") && matches("foo.**", "foo.**") && matches("foo.>>", "foo.>>") && matches("*foo", "*foo"));
    CHECK(!matches("foo.**", "foo.bar") && !matches("fo*", "foo") && !matches("foo>", "foo.bar"));
}

TEST(wildcards_are_found_and_the_literal_beginning_ends_before_them)
{
    const struct { const char *pattern; size_t prefix; } table[] = {
        {"foo", 3}, {"foo.*", 4}, {"foo.>", 4}, {">", 0}, {"*", 0}, {"*.foo", 0}, {"foo.b*", 6}, {"foo>", 4}, {"a.b.*.c", 4},
        {"foo.**", 6}, {"a.>>.>", 5},
    };
    for (size_t i = 0; i < sizeof(table) / sizeof(*table); i++) {
        size_t length = strlen(table[i].pattern);
        CHECK_EQUAL(nsn_pattern_literal_prefix(table[i].pattern, length), table[i].prefix);
        CHECK_EQUAL(nsn_pattern_has_wildcard(table[i].pattern, length), table[i].prefix < length);
    }
}

CHECK_MAIN()
