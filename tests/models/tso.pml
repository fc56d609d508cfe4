/* Memory as x86-TSO has it: a store waits in its process's buffer, first in first out, until it reaches memory at some later
 * time; a fence waits until the buffer is empty. A load reads memory: as in libnsn no process reads back what it wrote, so
 * nothing needs to be forwarded from its buffer. CELLS, WRITERS and DEPTH are the model's. */
byte memory[CELLS];
chan buffers[WRITERS] = [DEPTH] of { byte, byte };

#define STORE(writer, cell, value) buffers[writer] ! (cell), (value)
#define FENCE(writer) empty(buffers[writer])

proctype buffer(byte writer)
{
    byte cell, value;
end:
    do
    :: atomic { buffers[writer] ? cell, value; memory[cell] = value; cell = 0; value = 0 }
    od
}
