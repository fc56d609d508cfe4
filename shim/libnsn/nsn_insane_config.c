/* Reads nsn-app.cfg: the part of TOML that it needs. Sections, comments, and key = value with numbers, strings and booleans;
 * what stands under other keys and sections is left to those who know it. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_insane_internal.h"

#define LINE_MAX_BYTES 4096

struct reader {
    const char *path;
    int number;                   /* of the line */
    bool in_app, has_port;
    struct nsn_app_config *config;
};

static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    char *end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1]))
        *--end = 0;
    return text;
}

/* Cuts a comment off, which begins at a # outside of quotes. */
static void cut_comment(char *text)
{
    char quote = 0;
    for (; *text; text++) {
        if (quote && *text == '\\' && quote == '"' && text[1])
            text++;
        else if (quote ? *text == quote : *text == '"' || *text == '\'')
            quote = quote ? 0 : *text;
        else if (!quote && *text == '#')
            *text = 0;
        if (!*text)
            return;
    }
}

static int wrong(const struct reader *reader, const char *key, const char *value, const char *allowed)
{
    return nsn_insane_fail(-EINVAL, "%s:%d: %s = %s: allowed is %s", reader->path, reader->number, key, value, allowed);
}

static int read_port(struct reader *reader, const char *key, const char *value)
{
    char *end;
    long number = strtol(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end || number < 1 || number > 65535)
        return wrong(reader, key, value, "a whole number from 1 to 65535");
    reader->config->application_id = (uint32_t)number;
    reader->has_port = true;
    return 0;
}

/* Without its quotes; NULL: it has none. */
static char *unquoted(char *value)
{
    size_t length = strlen(value);
    if (length < 2 || (*value != '"' && *value != '\'') || value[length - 1] != *value)
        return NULL;
    value[length - 1] = 0;
    return value + 1;
}

/* A text in quotes; in double ones a backslash makes the next quote or backslash one of the text. */
static int read_text(struct reader *reader, const char *key, char *value, char text[NSN_CREDENTIAL_MAX])
{
    char quote = *value;
    size_t used = 0;
    const char *at = unquoted(value);
    for (; at && *at && used < NSN_CREDENTIAL_MAX - 1; at++) {
        bool escaped = quote == '"' && *at == '\\';
        at += escaped;
        if (escaped ? *at != '\\' && *at != '"' : *at == quote)
            at = NULL;
        else
            text[used++] = *at;
        if (!at)
            break;
    }
    if (!at || *at || !used) /* it may be a secret: it is not shown */
        return wrong(reader, key, "…", "a text in quotes of 1 to 255 bytes, in which \\\" and \\\\ are the only escapes");
    text[used] = 0;
    return 0;
}

static int read_level(struct reader *reader, const char *key, char *value)
{
    char *text = unquoted(value);
    value = text ? text : value;
    /* INSANE's finer levels have nothing to say here. */
    static const struct { const char *name; int level; } levels[] = {
        {"none", NSN_LOG_NONE}, {"error", NSN_LOG_ERROR}, {"warn", NSN_LOG_WARN},
        {"info", NSN_LOG_WARN}, {"debug", NSN_LOG_WARN}, {"trace", NSN_LOG_WARN},
    };
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++)
        if (strcmp(value, levels[i].name) == 0) {
            reader->config->log_level = levels[i].level;
            return 0;
        }
    return wrong(reader, key, value, "\"none\", \"error\", \"warn\", \"info\", \"debug\" or \"trace\"");
}

static int read_switch(struct reader *reader, const char *key, const char *value)
{
    bool on = strcmp(value, "true") == 0;
    if (!on && strcmp(value, "false") != 0)
        return wrong(reader, key, value, "true or false");
    reader->config->echo = on;
    return 0;
}

static int read_section(struct reader *reader, char *line)
{
    size_t length = strlen(line);
    if (length < 3 || line[length - 1] != ']')
        return nsn_insane_fail(-EINVAL, "%s:%d: %s: a section is written as [app]", reader->path, reader->number, line);
    line[length - 1] = 0;
    reader->in_app = strcmp(trim(line + 1), "app") == 0;
    return 0;
}

static int read_line(struct reader *reader, char *line)
{
    cut_comment(line);
    line = trim(line);
    if (!*line)
        return 0;
    if (*line == '[')
        return read_section(reader, line);
    char *equals = strchr(line, '=');
    if (!equals || equals == line)
        return nsn_insane_fail(-EINVAL, "%s:%d: %s: expected is key = value", reader->path, reader->number, line);
    *equals = 0;
    char *key = trim(line), *value = trim(equals + 1);
    if (!*value)
        return nsn_insane_fail(-EINVAL, "%s:%d: %s has no value", reader->path, reader->number, key);
    if (!reader->in_app)
        return 0;
    if (strcmp(key, "l4_port") == 0)
        return read_port(reader, key, value);
    if (strcmp(key, "log_level") == 0)
        return read_level(reader, key, value);
    if (strcmp(key, "echo") == 0)
        return read_switch(reader, key, value);
    if (strcmp(key, "user") == 0)
        return read_text(reader, key, value, reader->config->user);
    if (strcmp(key, "password") == 0)
        return read_text(reader, key, value, reader->config->password);
    if (strcmp(key, "token") == 0)
        return read_text(reader, key, value, reader->config->token);
    return 0;
}

static int read_lines(struct reader *reader, FILE *file)
{
    char line[LINE_MAX_BYTES];
    while (fgets(line, sizeof line, file)) {
        reader->number++;
        if (!strchr(line, '\n') && !feof(file))
            return nsn_insane_fail(-EINVAL, "%s:%d: a line has at most %d bytes", reader->path, reader->number,
                                   LINE_MAX_BYTES);
        int result = read_line(reader, line);
        if (result < 0)
            return result;
    }
    if (ferror(file))
        return nsn_insane_fail(-EIO, "%s cannot be read: %s", reader->path, strerror(errno));
    if (!reader->has_port)
        return nsn_insane_fail(-EINVAL, "%s says no application ID: write l4_port = N (1 to 65535) under [app]",
                               reader->path);
    return 0;
}

int nsn_app_config_read(const char *path, struct nsn_app_config *config)
{
    const char *chosen = getenv("INSANE_APP_CONFIG");
    if (!path)
        path = chosen && *chosen ? chosen : NSN_APP_DEFAULT_CONFIG_FILE;
    *config = (struct nsn_app_config){.log_level = NSN_LOG_WARN};
    FILE *file = fopen(path, "re");
    if (!file && errno == ENOENT)
        return nsn_insane_fail(-ENOENT, "there is no %s: write one with the lines [app] and l4_port = N, or name another by "
                               "INSANE_APP_CONFIG", path);
    if (!file)
        return nsn_insane_fail(-errno, "%s cannot be opened: %s", path, strerror(errno));
    struct reader reader = {.path = path, .config = config};
    int result = read_lines(&reader, file);
    fclose(file);
    return result;
}
